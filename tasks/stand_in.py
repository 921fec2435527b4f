"""The student's stand-in: its own text in place of annotations that give another answer and that the TA trusts less.

Selection has made both: the student's samples, and the TA's confidence in the majority answer.
"""

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from infra.manifest import Part
from infra.parts import read_part
from tasks.ids import Ids
from tasks.stage import Stage

SIGNALS, SAMPLES = "select", "student-sample"


class Own(NamedTuple):
    """The student's sample that carries its majority answer, and the TA's confidence in its text."""

    sample: dict[str, Any]
    confidence: float


class OwnAnswers:
    """The student's answers to selected prompts, where the TA has a confidence in them."""

    def __init__(self, stage: Stage[Any]) -> None:
        self.store = stage.store
        self.signals = stage.input(SIGNALS).tables["signals"].parts
        self.samples = stage.input(SAMPLES).tables["samples"].by_shard
        # Which part of the signals a prompt stands in; what is read of a part is read when it is needed.
        self.known = Ids(map(self._known, self.signals))

    def _known(self, part: Part) -> pa.ChunkedArray:
        """Prompts of a part that were selected and have a confidence."""
        rows = read_part(self.store, part, ["prompt_id", "selected", "ta_student"])
        return rows.filter(pc.and_(rows["selected"], pc.is_valid(rows["ta_student"])))["prompt_id"]

    def of(self, prompt_ids: Iterable[str]) -> dict[str, Own]:
        """The answers to these prompts, as far as there are any."""
        names = list(dict.fromkeys(prompt_ids))
        by_part: dict[int, list[str]] = {}
        for name, number in zip(names, self.known.find(pa.array(names, pa.string())).tolist(), strict=True):
            by_part.setdefault(number, []).append(name)
        by_part.pop(-1, None)
        found = {}
        for number, wanted in by_part.items():
            part = self.signals[number]
            written = self._rows(self.samples[part.shard], wanted)
            # The first of equal texts, as the majority's is.
            texts = {(sample["prompt_id"], sample["text"]): sample for sample in reversed(written)}
            for row in self._rows(part, wanted):
                sample = texts[row["prompt_id"], row["majority_text"]] | {"distributions": None}
                found[row["prompt_id"]] = Own(sample, row["ta_student"])
        return found

    def _rows(self, part: Part, prompt_ids: Collection[str]) -> list[dict[str, Any]]:
        rows = read_part(self.store, part)
        return rows.filter(pc.is_in(rows["prompt_id"], pa.array(prompt_ids))).to_pylist()

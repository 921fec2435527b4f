"""The student's stand-in: its own text in place of annotations that give another answer and that the TA trusts less.

Selection has made both: the student's samples, and the TA's confidence in the majority answer.
"""

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from infra.manifest import read_part
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
        self.signals, self.samples = (
            {part.shard: part for part in stage.input(name).tables[table].parts}
            for name, table in ((SIGNALS, "signals"), (SAMPLES, "samples"))
        )
        # By prompt, its shard among the candidates; what is read of a shard is read when it is needed.
        self.shards: dict[str, int] = {}
        for shard, part in self.signals.items():
            rows = read_part(self.store, part, ["prompt_id", "selected", "ta_student"])
            known = rows.filter(pc.and_(rows["selected"], pc.is_valid(rows["ta_student"])))
            self.shards |= dict.fromkeys(known["prompt_id"].to_pylist(), shard)

    def of(self, prompt_ids: Iterable[str]) -> dict[str, Own]:
        """The answers to these prompts, as far as there are any."""
        by_shard: dict[int, list[str]] = {}
        for prompt_id in dict.fromkeys(prompt_ids):
            if prompt_id in self.shards:
                by_shard.setdefault(self.shards[prompt_id], []).append(prompt_id)
        found = {}
        for shard, wanted in by_shard.items():
            written = self._rows(self.samples[shard], wanted)
            # The first of equal texts, as the majority's is.
            texts = {(sample["prompt_id"], sample["text"]): sample for sample in reversed(written)}
            for row in self._rows(self.signals[shard], wanted):
                sample = texts[row["prompt_id"], row["majority_text"]] | {"distributions": None}
                found[row["prompt_id"]] = Own(sample, row["ta_student"])
        return found

    def _rows(self, part: Any, prompt_ids: Collection[str]) -> list[dict[str, Any]]:
        rows = read_part(self.store, part)
        return rows.filter(pc.is_in(rows["prompt_id"], pa.array(prompt_ids))).to_pylist()

"""Auxiliary targets: the teacher is asked its prompts once more, by a template; what it says are further training rows.

    python -m tasks.auxiliary --spec SPEC.json

It asks as ``tasks.sample`` does, charged to the same budget, and then keeps what is whole. Every target stays in
``targets`` with the reason why it was kept or dropped. Rows keep their prompt's id, so that training sets aside
the targets of validation prompts too.
"""

from typing import Any

import pyarrow as pa

from infra.parts import read_part
from tasks import sample, schemas
from tasks.foreign import InStudentTokens
from tasks.sample import SampleSettings, slices, worded
from tasks.stage import Stage, main


class AuxiliarySettings(SampleSettings):
    """What is asked, and what becomes of it."""

    weight: float
    """Loss weight of the rows."""
    drop_truncated: bool = True
    """Drop targets that hit the length limit."""


def reason(settings: AuxiliarySettings, target: dict[str, Any]) -> str:
    """Why a target is kept or dropped."""
    if not target["text"].strip():
        return "empty"
    return "truncated" if settings.drop_truncated and target["finish_reason"] == "length" else "kept"


def keep(stage: Stage[AuxiliarySettings]) -> None:
    """Commit every target with its reason, and the rows to train on."""
    settings, tables = stage.settings, stage.manifest.tables
    readable = InStudentTokens(stage, settings.template_args)
    parts = tables["samples"].by_shard
    distributions = tables["distributions"].by_shard if settings.distributions else {}
    for shard, prompts in slices(stage, "prompts", settings.table, settings.shard_size, settings.limit):
        asked = {row["prompt_id"]: row for row in worded(prompts.to_pylist(), settings.template)}
        stored = read_part(stage.store, distributions[shard]).to_pylist() if distributions else []
        blobs = {row["sample_id"]: row["distributions"] for row in stored}
        targets, kept = [], []
        for row in read_part(stage.store, parts[shard]).to_pylist():
            why, name = reason(settings, row), row["sample_id"]
            ids = {"sample_id": name, "prompt_id": row["prompt_id"], "source": asked[row["prompt_id"]]["source"]}
            targets.append(ids | {"text": row["text"], "kept": why == "kept", "reason": why})
            if why == "kept":
                written = readable.of(asked[row["prompt_id"]], row)
                tokens = {key: written[key] for key in ("prompt_token_ids", "token_ids")}
                own = {"row_id": name, "weight": settings.weight, "distributions": blobs.get(name)}
                kept.append(ids | tokens | own)
        stage.commit("targets", shard, pa.Table.from_pylist(targets, schema=schemas.TARGET))
        stage.commit("kept", shard, pa.Table.from_pylist(kept, schema=schemas.KEPT))
    stage.close_table("targets", schemas.TARGET)
    stage.close_table("kept", schemas.KEPT)


def run(stage: Stage[AuxiliarySettings]) -> None:
    sample.run(stage)  # type: ignore[arg-type]
    keep(stage)
    stage.facts["kept"] = stage.manifest.tables["kept"].rows


if __name__ == "__main__":
    main(AuxiliarySettings, run)

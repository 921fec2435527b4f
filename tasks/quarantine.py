"""Prompts that an engine dies of: kept apart with the reason, so that the others go on."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tasks.isolate import REFUSED
from tasks.stage import Stage

TABLE = "quarantine"
QUARANTINE = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("reason", pa.string()),  # engine_died
        ("said", pa.string()),  # what the engine died of, in one line
    ]
)


def answered(stage: Stage[Any], shard: int, answers: pa.Table, prompt_ids: list[str]) -> pa.Table:
    """The rows of a shard that the engine answered; the prompts of the others are committed to the quarantine."""
    missing = {
        prompt_ids[row["conversation"]]: row["finish_reason"].removeprefix(REFUSED)
        for row in answers.filter(pc.is_null(answers["text"])).select(["conversation", "finish_reason"]).to_pylist()
    }
    if not missing:
        return answers
    rows = [{"prompt_id": name, "reason": "engine_died", "said": said} for name, said in missing.items()]
    stage.commit(TABLE, shard, pa.Table.from_pylist(rows, schema=QUARANTINE))
    return answers.filter(pc.is_valid(answers["text"]))


def close(stage: Stage[Any]) -> None:
    """Enter the quarantine into the manifest, where anything is in it."""
    count = sum(part.rows for part in stage.done(TABLE).values())
    if count:
        stage.close_table(TABLE, QUARANTINE)
    stage.facts["quarantined"] = count

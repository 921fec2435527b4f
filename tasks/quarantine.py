"""Prompts that an engine dies of or an endpoint does not answer: kept apart with the reason, so the others go on."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tasks.isolate import REFUSED
from tasks.stage import Stage

TABLE = "quarantine"
QUARANTINE = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("reason", pa.string()),  # engine_died | no_answer
        ("said", pa.string()),  # what the engine died of, or an endpoint said, in one line
    ]
)


def answered(stage: Stage[Any], shard: int, answers: pa.Table, prompt_ids: list[str]) -> pa.Table:
    """The rows of a shard that the engine answered; the prompts of the others are committed to the quarantine."""
    missing = answers.filter(pc.is_null(answers["text"]))
    if not missing.num_rows:
        return answers
    rows = {}
    for row in missing.to_pylist():
        died = (row["finish_reason"] or "").startswith(REFUSED)
        said = row["finish_reason"].removeprefix(REFUSED) if died else row.get("error")
        name = prompt_ids[row["conversation"]]
        rows[name] = {"prompt_id": name, "reason": "engine_died" if died else "no_answer", "said": said}
    stage.commit(TABLE, shard, pa.Table.from_pylist(list(rows.values()), schema=QUARANTINE))
    return answers.filter(pc.is_valid(answers["text"]))


def close(stage: Stage[Any]) -> None:
    """Enter the quarantine into the manifest, where anything is in it."""
    count = sum(part.rows for part in stage.done(TABLE).values())
    if count:
        stage.close_table(TABLE, QUARANTINE)
    stage.facts["quarantined"] = count

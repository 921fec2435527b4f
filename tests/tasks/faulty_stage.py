"""A stage of a few shards as a program, through the same ``main`` as every stage, with ways to die at a chosen moment.

python faulty_stage.py --root STORE --spec SPEC
"""

import os
import signal
from collections.abc import Callable
from random import Random
from typing import Any

import pyarrow as pa
from pydantic import BaseModel

from tasks.stage import Stage, main

SCHEMA = pa.schema([("row", pa.int64()), ("text", pa.string())])


class Settings(BaseModel):
    """What is made."""

    shards: int = 3
    rows: int = 1000


def run(stage: Stage[Settings]) -> None:
    made, rows = 0, stage.settings.rows
    done = stage.done("rows")
    for shard in range(stage.settings.shards):
        if shard not in done:
            # Text that does not compress, so that parts are as large as they seem.
            text = Random(shard).randbytes(64 * rows).hex()
            columns = {
                "row": range(shard * rows, (shard + 1) * rows),
                "text": [text[128 * row : 128 * (row + 1)] for row in range(rows)],
            }
            stage.commit("rows", shard, pa.table(columns, schema=SCHEMA))
            made += 1
    stage.close_table("rows", SCHEMA)
    stage.facts.update(made=made)


def dying(function: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    """The function, after whose last allowed call this process is killed."""

    def call(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call


if __name__ == "__main__":
    if "DIE_AFTER" in os.environ:
        # Every change of a local store is one of these.
        left = [int(os.environ["DIE_AFTER"])]
        for name in ("fsync", "replace", "link", "unlink"):
            setattr(os, name, dying(getattr(os, name), left))
    main(Settings, run)

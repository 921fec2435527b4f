"""A stage that does next to nothing: some lines of log, progress, one row. What it takes beyond that is overhead.

python -m benchmarks.short_stage --spec SPEC.json
"""

import pyarrow as pa

from tasks.config.base import Config
from tasks.stage import Stage, main

LINES = 10


class ShortSettings(Config):
    """Which of its like it is."""

    number: int
    """Its row; another number is another stage."""


def run(stage: Stage[ShortSettings]) -> None:
    stage.progress(0, 1, "rows")
    for line in range(LINES):
        stage.log.info("line %d", line)
    stage.write_table("rows", pa.table({"number": [stage.settings.number]}))
    stage.progress(1, 1, "rows", last=True)


if __name__ == "__main__":
    main(ShortSettings, run)

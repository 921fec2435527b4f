"""A stage whose first attempt never ends; the next one is done at once."""

import time

import pyarrow as pa

from tasks.config.base import Config
from tasks.stage import Stage, main


class LateSettings(Config):
    """None."""


def run(stage: Stage[LateSettings]) -> None:
    began = f"{stage.spec.folder}/began"
    if not stage.store.exists(began):
        stage.store.write(began, b"")
        time.sleep(3600)
    stage.write_table("rows", pa.table({"number": [1]}))


if __name__ == "__main__":
    main(LateSettings, run)

"""A training worker's memory: of each plan in turn, this process's peak behind a step, and what it holds behind a
validation, in bytes.

python tests/tasks/worker_memory.py PLAN.json...
"""

import json
import re
import sys
from pathlib import Path

import torch

from infra import mapped
from tasks.loop import Loop
from tasks.plan import Plan
from tasks.student import World


def status(name: str) -> int:
    """A figure of this process in bytes, as Linux names it."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    mapped.BATCH_BYTES = 1 << 20  # what is in memory of a table of any size: little, to tell it from what grows
    for file in sys.argv[1:]:
        loop = Loop(Plan.model_validate_json(Path(file).read_text()), World(0, 1, torch.device("cpu")))
        loop.step()
        # A validation maps what it reads: pages that the system takes back at will.
        peak = status("VmHWM")
        loop.validate()
        print(json.dumps({"rows": loop.feed.sizes()["rows"], "peak": peak, "held": status("RssAnon")}), flush=True)

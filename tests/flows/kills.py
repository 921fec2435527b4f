"""``kill -9`` of one kind of process of a run."""

import time
from collections.abc import Iterator
from contextlib import suppress

import psutil

from infra.process import TOKEN

# By kind: what stands on a process's command line.
KINDS = {
    "job": "-m tasks.",
    "engine room": "-m infra.engine_room",
    "engine": "ray::Engine",
    "training worker": "ray::RayTrainWorker",
    "Ray head": "gcs_server",
    "raylet": "raylet/raylet",
    "Prefect's server": "prefect server start",
}
SECONDS = 300.0


def family(flow: int) -> list[psutil.Process]:
    """Everything that a run started: its guards hand a token down."""
    tokens = set()
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(flow).children():
            with suppress(psutil.Error):
                line = child.cmdline()
                if "infra.process" in line:
                    tokens.add(line[line.index("infra.process") + 1])
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(TOKEN) in tokens:
                found.append(process)
    return found


def kinds(flow: int) -> Iterator[tuple[str, psutil.Process]]:
    """Processes of a run that are of a kind, guards excepted."""
    for process in family(flow):
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if "infra.process" not in line:
                yield from ((kind, process) for kind, mark in KINDS.items() if mark in line)


def wait_for(flow: int, kind: str, word: str = "", besides: frozenset[int] = frozenset()) -> list[psutil.Process]:
    """All processes of the kind with the word on their command line, once there is one besides those."""
    deadline = time.monotonic() + SECONDS
    while True:
        assert time.monotonic() < deadline, f"no {kind}"
        found = []
        for known, process in kinds(flow):
            with suppress(psutil.Error):
                if known == kind and process.pid not in besides and word in " ".join(process.cmdline()):
                    found.append(process)
        if found:
            return found
        time.sleep(0.1)


def strike(flow: int, kind: str, word: str = "") -> frozenset[int]:
    """Kill them as soon as there are any; returns their ids, to tell apart what comes in their place."""
    found = wait_for(flow, kind, word)
    for process in found:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return frozenset(process.pid for process in found)

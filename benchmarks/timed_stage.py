"""The sampling stage as it is (``tasks/sample.py``), with timed engines: what it takes beyond their time is the
scheduler's, Ray's and the store's.

python -m benchmarks.timed_stage --spec SPEC.json
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import ray
from pydantic import Field

import tasks.sample
from benchmarks.meter import Peak
from benchmarks.timed_engine import TimedRoom
from infra.process import TOKEN
from infra.store import LocalStore
from tasks.connection import connected
from tasks.engines import EngineAccess
from tasks.sample import SampleSettings
from tasks.stage import Stage, main

# Names of a listing that one request brings, as S3 counts them.
PAGE = 1000
HEAD = ("gcs_server", "raylet", "dashboard", "agent", "monitor")


class TimedSettings(SampleSettings):
    """Sampling, and how engines are timed."""

    nodes: int
    """Engines, one a node."""
    speeds: dict[int, float] = Field(default_factory=dict)
    """Of single engines, as a share of the others'."""
    compression: float = 1.0
    """How much faster than real time engines are."""
    tokens: int
    """Tokens of an answer."""


class TimedAccess(EngineAccess):
    """Access to the room of timed engines."""

    def __init__(self, stage: Stage[Any], room: Any) -> None:
        self.stage, self._own = stage, room


def counted(requests: Counter[str], name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        requests[name] += 1
        return method(*arguments, **named)

    def pages(*arguments: Any, **named: Any) -> Iterator[str]:
        requests[name] += 1
        for number, path in enumerate(method(*arguments, **named), 1):
            requests[name] += number % PAGE == 0
            yield path

    return pages if name == "list" else call


def head_seconds() -> float:
    """CPU time of this process and of the head's own, not of its workers."""
    seconds = time.process_time()
    for process in psutil.process_iter():
        try:
            if process.environ().get(TOKEN) != os.environ.get(TOKEN) or process.pid == os.getpid():
                continue
            line = " ".join(process.cmdline())
            if not line.startswith("ray::") and any(name in line for name in HEAD):
                seconds += sum(process.cpu_times()[:2])
        except psutil.Error:
            continue
    return seconds


def run(stage: Stage[TimedSettings]) -> None:
    settings, requests = stage.settings, Counter[str]()
    for name in ("read", "write", "create", "list", "exists", "delete"):
        setattr(LocalStore, name, counted(requests, name, getattr(LocalStore, name)))
    with connected(stage.spec.runtime):
        room = ray.remote(TimedRoom).options(num_cpus=0)
        opened = room.remote(settings.nodes, settings.speeds, settings.compression, settings.tokens)
        ray.get(opened.opened.remote())
        before = head_seconds()

        @contextmanager
        def timed(stage: Stage[Any]) -> Iterator[EngineAccess]:
            yield TimedAccess(stage, opened)

        tasks.sample.engines = timed  # type: ignore[assignment]
        with Peak() as peak:
            tasks.sample.run(stage)  # type: ignore[arg-type]
        stage.facts["head_cpu_seconds"] = round(head_seconds() - before, 2)
    stage.facts["requests"] = dict(requests)
    stage.facts["peak_mib"] = round(peak.most / 2**20, 1)


if __name__ == "__main__":
    main(TimedSettings, run)

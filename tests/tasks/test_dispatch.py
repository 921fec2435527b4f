"""The queue of shards over replicas that are slow, not there, or die: real actors that wait instead of computing."""

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import ray

from tasks.calls import Call
from tasks.dispatch import LEAST, Dispatch

SIZE = 64
SECONDS = 0.004  # a request


class Waiter:
    """Answers numbers with themselves, after so many seconds each. ``starts``: how long it takes to be there; where it
    ``dies`` of its first call, only from then on."""

    def __init__(self, log: str, seconds: float = SECONDS, starts: float = 0.0, dies: bool = False) -> None:
        self.log, self.seconds, self.life = Path(log), seconds, str(os.getpid())
        self.dies = dies and not (self.log / "born").exists()
        (self.log / "born").touch()
        if not self.dies:
            time.sleep(starts)

    def ready(self) -> str:
        return self.life

    def choice(self, model: str, numbers: list[float]) -> list[float]:
        (self.log / f"asked-{time.monotonic_ns()}").write_text(str(len(numbers)))
        if self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds * len(numbers))
        return numbers


class Engines:
    """What ``Dispatch`` is told of replicas."""

    deadline_seconds = 60.0

    def __init__(self, folder: Path, *options: dict[str, Any]) -> None:
        self.folders = [folder / str(number) for number in range(len(options))]
        actor = ray.remote(Waiter).options(num_cpus=0, max_restarts=-1)
        for own in self.folders:
            own.mkdir()
        self.replicas = [actor.remote(str(own), **named) for own, named in zip(self.folders, options, strict=True)]

    def actors(self) -> list[Any]:
        return self.replicas

    def isolated(self, *_: Any) -> Any:
        raise AssertionError("nothing here is deadly twice")

    def sizes(self, number: int) -> list[int]:
        """Of the calls that a replica began."""
        return [int(path.read_text()) for path in sorted(self.folders[number].glob("asked-*"))]


def calls(count: int) -> dict[int, Call]:
    return {key: Call("choice", ("m", [key + place / SIZE for place in range(SIZE)]), {}) for key in range(count)}


def mapped(engines: Engines, asked: dict[int, Call]) -> dict[int, Any]:
    return dict(Dispatch(engines, iter(asked.items()), None, logging.getLogger("test")).results())


def test_replicas_share_what_is_left_though_one_is_slow_and_one_never_comes(cluster: None, tmp_path: Path) -> None:
    engines = Engines(tmp_path, {}, {"seconds": 8 * SECONDS}, {}, {"starts": 1000.0})
    ray.get([actor.ready.remote() for actor in engines.replicas[:3]])
    asked = calls(18)
    assert mapped(engines, asked) == {key: call.arguments[1] for key, call in asked.items()}
    first, slow, third, never = (engines.sizes(number) for number in range(4))
    assert never == []
    assert sum(first + slow + third) == 18 * SIZE
    assert sum(slow) < sum(first) / 2
    # Whole shards first, ever smaller pieces at the end.
    assert first[0] == third[0] == SIZE
    assert min(*first[-2:], *third[-2:]) < SIZE / 2
    assert min(first + third) >= LEAST


def test_a_replica_that_starts_again_holds_up_none(cluster: None, tmp_path: Path) -> None:
    engines = Engines(tmp_path, {}, {"dies": True, "starts": 1000.0})
    ray.get([actor.ready.remote() for actor in engines.replicas])
    asked = calls(6)
    assert mapped(engines, asked) == {key: call.arguments[1] for key, call in asked.items()}
    assert engines.sizes(1) == [SIZE]
    assert sum(engines.sizes(0)) == 6 * SIZE


def test_a_replica_gets_its_next_shard_when_the_stage_is_done_with_the_last(cluster: None, tmp_path: Path) -> None:
    """A stage that is killed costs each engine one shard: what waited at it would be done for nobody."""
    engines = Engines(tmp_path, {})
    for number, _ in enumerate(Dispatch(engines, iter(calls(4).items()), None, logging.getLogger("test")).results(), 1):
        time.sleep(0.2)
        assert len(engines.sizes(0)) == number

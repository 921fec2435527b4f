"""The queue of shards under a clock of its own: how long many replicas take, reckoned and not waited for."""

import logging
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.exceptions import TaskCancelledError

from tasks import dispatch
from tasks.calls import Call
from tasks.dispatch import LEAST, Dispatch

SIZE = 750


@dataclass(eq=False)
class Reference:
    """A call of a replica, and when it begins and ends."""

    begins: float
    ends: float
    value: Any
    cancelled: bool = False


class Clock:
    """Stands in for ``ray`` and ``time``: waiting moves it forward to what is waited for."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, references: list[Reference], num_returns: int = 1, timeout: float = 0.0) -> Any:
        first = min(references, key=lambda reference: reference.ends)
        if first.ends > self.now + timeout:
            self.now += timeout
            return [], references
        self.now = max(self.now, first.ends)
        return [first], []

    def get(self, reference: Reference) -> Any:
        if reference.cancelled:
            raise TaskCancelledError()
        return reference.value

    def cancel(self, reference: Reference) -> None:
        if reference.begins > self.now:
            reference.cancelled, reference.ends = True, self.now


@dataclass(eq=False)
class Replica:
    """Works off what it is sent in order, a second for ``per_second`` requests."""

    clock: Clock
    per_second: float
    random: random.Random
    starts: float = 0.0
    sent: list[Reference] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def method(self, model: str, numbers: list[int]) -> Reference:
        seconds = len(numbers) / self.per_second * self.random.uniform(0.95, 1.05)
        free = max([self.clock.now, *(reference.ends for reference in self.sent if not reference.cancelled)])
        self.sent.append(Reference(free, free + seconds, numbers))
        self.sizes.append(len(numbers))
        return self.sent[-1]


class Handle:
    """What ``ray`` makes of an actor."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.choice = self.Method(replica.method)
        self.ready = self.Method(lambda: Reference(replica.starts, replica.starts, "alive"))

    class Method:
        def __init__(self, remote: Any) -> None:
            self.remote = remote


class Engines:
    deadline_seconds = 1e9

    def __init__(self, replicas: list[Replica]) -> None:
        self.replicas = replicas

    def actors(self) -> list[Any]:
        return [Handle(replica) for replica in self.replicas]

    def isolated(self, *_: Any) -> Any:
        raise AssertionError("nothing dies here")


def efficiency(
    monkeypatch: pytest.MonkeyPatch, rates: list[float], starts: dict[int, float], shards: int, repeats: Any = None
) -> float:
    """The time the work takes on replicas that are never idle, over the time it takes."""
    clock = Clock()
    monkeypatch.setattr(dispatch, "ray", clock)
    monkeypatch.setattr(dispatch, "time", clock)
    replicas = [
        Replica(clock, rate, random.Random(number), starts.get(number, 0.0)) for number, rate in enumerate(rates)
    ]
    calls = [(key, Call("choice", ("m", list(range(key * SIZE, (key + 1) * SIZE))), {})) for key in range(shards)]
    engines = Engines(replicas)
    results = dict(Dispatch(engines, calls, repeats, logging.getLogger("test")).results())
    assert results == {key: call.arguments[1] for key, call in calls}
    assert min(min(replica.sizes, default=LEAST) for replica in replicas) >= (SIZE if repeats else LEAST)
    return shards * SIZE / sum(rates) / clock.now


@pytest.mark.parametrize("nodes", [1, 2, 3, 8, 64])
def test_replicas_of_one_speed_are_hardly_ever_idle(monkeypatch: pytest.MonkeyPatch, nodes: int) -> None:
    # Shards of a minute, ten for each.
    assert efficiency(monkeypatch, [SIZE / 60] * nodes, {}, 10 * nodes) > 0.98


@pytest.mark.parametrize("speed", [0.9, 0.7, 0.5, 0.2])
def test_a_slow_replica_holds_up_none(monkeypatch: pytest.MonkeyPatch, speed: float) -> None:
    rates = [SIZE / 60] * 16
    rates[3] *= speed
    assert efficiency(monkeypatch, rates, {}, 160) > 0.98


@pytest.mark.parametrize("shards", [3, 8, 16, 17, 20, 33])
def test_few_shards_are_shared_as_well(monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    assert efficiency(monkeypatch, [SIZE / 60] * 16, {}, shards) > (0.9 if shards > 3 else 0.8)


def test_one_that_never_comes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert efficiency(monkeypatch, [SIZE / 60] * 4, {2: 1e8}, 40) == pytest.approx(0.75, abs=0.03)


def test_what_a_ledger_covers_is_sent_when_somebody_is_free_and_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing is lost here, so nobody asks the ledger.
    assert efficiency(monkeypatch, [SIZE / 60] * 4, {}, 40, repeats=object()) > 0.9

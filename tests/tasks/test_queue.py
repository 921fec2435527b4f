"""The queue of shards under a clock of its own: how long many replicas take, reckoned and not waited for."""

import logging
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

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
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value

    def kill(self, handle: "Handle", no_restart: bool) -> None:
        assert not no_restart
        handle.replica.die(self.now)


@dataclass(eq=False)
class Replica:
    """Works off what it is sent in order, a second for ``per_second`` requests. Of ``deadly`` numbers it dies in the
    middle, at ``raising`` ones it raises, and of ``silent`` ones it never hears again; of the last two once."""

    clock: Clock
    per_second: float
    random: random.Random
    starts: float = 0.0
    restart: float = 300.0
    deadly: set[int] = field(default_factory=set)
    raising: set[int] = field(default_factory=set)
    silent: set[int] = field(default_factory=set)
    sent: list[Reference] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    lives: int = 1

    def method(self, model: str, numbers: list[int]) -> Reference:
        seconds = len(numbers) / self.per_second * self.random.uniform(0.95, 1.05)
        free = max([self.clock.now, self.starts, *(sent.ends for sent in self.sent)])
        made = Reference(free, free + seconds, numbers)
        self.sent.append(made)
        self.sizes.append(len(numbers))
        if self.raising & set(numbers):
            self.raising.clear()
            made.value = RayTaskError("choice", "its trace", RuntimeError("illegal memory access"))
        elif self.silent & set(numbers):
            self.silent.clear()
            made.ends = float("inf")
        elif self.deadly & set(numbers):
            self.die(free + seconds / 2)
        return made

    def die(self, at: float) -> None:
        """Calls that have not ended then end with it; a new life begins later."""
        for reference in self.sent:
            if reference.ends > at:
                reference.ends, reference.value = at, RayActorError()
        self.starts, self.lives = at + self.restart, self.lives + 1


class Handle:
    """What ``ray`` makes of an actor."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.choice = self.Method(replica.method)
        self.ready = self.Method(lambda: Reference(replica.starts, replica.starts, str(replica.lives)))

    class Method:
        def __init__(self, remote: Any) -> None:
            self.remote = remote


class Engines:
    """What the queue is told of replicas."""

    deadline_seconds = 1000.0

    def __init__(self, replicas: list[Replica]) -> None:
        self.replicas, self.alone = replicas, []

    def actors(self) -> list[Any]:
        return [Handle(replica) for replica in self.replicas]

    def isolated(self, key: Any, call: Call, repeats: Any, actor: Any, kill: bool) -> tuple[Any, Any]:
        self.alone.append(key)
        return call.arguments[1], actor


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
    assert engines.alone == []
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
    # One at a fifth of the speed has two whole shards before its pace is known.
    assert efficiency(monkeypatch, rates, {}, 160) > (0.98 if speed > 0.2 else 0.94)


@pytest.mark.parametrize("shards", [3, 8, 16, 17, 20, 33])
def test_few_shards_are_shared_as_well(monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    assert efficiency(monkeypatch, [SIZE / 60] * 16, {}, shards) > (0.9 if shards > 3 else 0.8)


def test_one_that_never_comes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert efficiency(monkeypatch, [SIZE / 60] * 4, {2: 1e8}, 40) == pytest.approx(0.75, abs=0.03)


def test_what_a_ledger_covers_is_sent_when_somebody_is_free_and_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing is lost here, so nobody asks the ledger.
    assert efficiency(monkeypatch, [SIZE / 60] * 4, {}, 40, repeats=object()) > 0.9


def disturbed(
    monkeypatch: pytest.MonkeyPatch, replicas: int, shards: int, repeats: Any = None, **troubles: set[int]
) -> tuple[Engines, float]:
    """Replicas after they have worked off these shards through these troubles, and how long it took."""
    clock = Clock()
    monkeypatch.setattr(dispatch, "ray", clock)
    monkeypatch.setattr(dispatch, "time", clock)
    engines = Engines([Replica(clock, SIZE / 60, random.Random(number), **troubles) for number in range(replicas)])
    calls = {key: Call("choice", ("m", list(range(key * SIZE, (key + 1) * SIZE))), {}) for key in range(shards)}
    if repeats:
        repeats.calls = calls
    results = dict(Dispatch(engines, iter(calls.items()), repeats, logging.getLogger("test")).results())
    assert results == {key: call.arguments[1] for key, call in calls.items()}
    return engines, clock.now


def test_one_that_raised_is_ended_and_holds_up_none(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each raises once, at another shard, and is away for five minutes then; ten shards each take ten.
    engines, seconds = disturbed(monkeypatch, 8, 80, raising={3000})
    assert sum(replica.lives == 2 for replica in engines.replicas) in (1, 2)
    assert engines.alone == []
    assert seconds < 60 * 80 / 8 * 1.15


def test_one_that_is_silent_is_ended_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    engines, seconds = disturbed(monkeypatch, 4, 8, silent={5})
    assert [replica.lives for replica in engines.replicas] == [2, 1, 1, 1]
    # Its shard is what the others did last.
    assert 1000 < seconds < 1100


def test_one_that_does_not_load_is_started_again_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    # 64 shards of a minute on the others: something ends all the time.
    assert efficiency(monkeypatch, [SIZE / 60] * 4, {2: 1e8}, 160) == pytest.approx(0.88, abs=0.02)
    assert efficiency(monkeypatch, [SIZE / 60], {0: 1e8}, 10) == pytest.approx(600 / (1000 + 300 + 600), abs=0.01)


def test_requests_that_kill_are_looked_for_at_the_second_death(monkeypatch: pytest.MonkeyPatch) -> None:
    engines, _ = disturbed(monkeypatch, 4, 40, deadly={5 * SIZE + 7})
    assert engines.alone == [5]
    # What waited behind it was just sent again.
    assert sum(replica.lives for replica in engines.replicas) == 6


class Ledger:
    """Allows every repetition, and notes it."""

    calls: dict[int, Call]

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def lost(self, key: Any, start: int = 0, end: int | None = None) -> None:
        self.told.append(("lost", key))

    def again(self, key: Any, start: int = 0, end: int | None = None) -> Call:
        self.told.append(("again", key))
        return self.calls[key]


def test_a_ledger_hears_of_all_that_was_lost_before_it_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger()
    engines, _ = disturbed(monkeypatch, 2, 12, ledger, deadly={3 * SIZE})
    assert engines.alone == [3]
    # The deadly shard is lost twice and sent again once here; what waited behind it as often as it was lost.
    assert ledger.told.count(("lost", 3)) == 2
    assert ledger.told.count(("again", 3)) == 1
    others = {key for _, key in ledger.told} - {3}
    assert all(ledger.told.count(("lost", key)) == ledger.told.count(("again", key)) for key in others)
    assert all(ledger.told.index(("lost", key)) < ledger.told.index(("again", key)) for key in {3, *others})

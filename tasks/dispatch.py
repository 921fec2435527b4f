"""Calls on their way through the replicas of one engine: a queue of shards, of which whoever is free takes the next.

Towards the end, shards that are left are cut into ever smaller pieces, so that all end together. A replica that is
slow, still loading, or starting again after it died holds up what it works on and nothing else. Which replica answers
what decides no result: requests carry their seeds, and pieces are joined to their shard.

Where a ledger covers what is sent (``repeats``), a shard is sent when a replica is free for it, and stays whole: what
was set aside for it is lost if this process dies.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from logging import Logger
from math import ceil
from typing import Any, Protocol

import ray
from ray.exceptions import ActorUnavailableError, ObjectLostError, RayActorError, RayTaskError

from tasks.calls import Call
from tasks.isolate import joined, part, size

# Shards for each replica that are taken from the stage before they are sent, to see the end in time. None waits at the
# replica itself: what does cannot be taken back, and is done there even when the stage that sent it is dead, so that a
# kill would cost two shards. Ray's cancel of a queued call hides its result only.
AHEAD = 2
# How often one shard is tried whole, before the requests that its engine dies of are looked for.
SHARD_TRIES = 2
# Fewer requests are not worth a call of their own.
LEAST = 16
# A replica counts as slow below this share of the usual speed; it gets shares of a shard, of this size at least.
SLOW, SLOWEST = 0.75, 0.25
# How often replicas are looked after while their results are waited for.
WATCH_SECONDS = 5.0
# Between two questions whether a replica is there again.
PAUSE_SECONDS = 0.5
END = object()
# What a call raises whose engine is gone, and its result with it.
GONE = (RayActorError, ObjectLostError)


class Repeats(Protocol):
    """Who says whether a call, or its requests from one number to another, may be made again. None: not yet."""

    def lost(self, key: Any, start: int = 0, end: int | None = None) -> None: ...

    def again(self, key: Any, start: int = 0, end: int | None = None) -> Call | None: ...


class Replicas(Protocol):
    """Who knows the replicas."""

    @property
    def deadline_seconds(self) -> float:
        """How long one may be silent."""

    def actors(self) -> list[Any]:
        """Their handles, always in the same order; a new room's where the old one is gone."""

    def isolated(self, key: Any, call: Call, repeats: Repeats | None, actor: Any, kill: bool) -> tuple[Any, Any]:
        """The result of a call that ``actor`` at last did not survive, without the requests that kill it; and the
        handle of that replica, which is there again. ``kill``: it raised, and is alive."""


@dataclass
class Job:
    """One call of the stage, and the results of its pieces by the number of their first request."""

    key: Any
    call: Call
    left: int
    results: list[tuple[int, Any]] = field(default_factory=list)


@dataclass
class Piece:
    """Requests ``start`` to ``end`` of a job: all of them, unless it was cut."""

    job: Job
    start: int
    end: int
    tries: int = 0

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def call(self) -> Call:
        whole = self.size == size(self.job.call)
        return self.job.call if whole else part(self.job.call, self.start, self.end)


@dataclass(eq=False)
class Replica:
    """One engine: what it works on, and whether it takes more."""

    actor: Any
    sent: Any = None
    since: float = 0.0  # when it was given that
    pace: float = 0.0  # requests a second, of its last call
    up: bool = False
    condemned: bool = False  # it raised, and is ended
    life: str = ""
    over: str = ""  # the life that was ended
    coming: Any = None  # reference of its answer that it is there
    asked: float = 0.0


class Dispatch:
    """A stage's calls, and the replicas that answer them."""

    def __init__(self, engines: Replicas, calls: Iterable[Any], repeats: Repeats | None, log: Logger) -> None:
        self.engines, self.source, self.repeats, self.log = engines, iter(calls), repeats, log
        self.replicas = [Replica(actor) for actor in engines.actors()]
        self.running: dict[Any, tuple[Piece, Replica]] = {}
        self.ahead: deque[Piece] = deque()  # taken from the source
        self.lost: deque[Piece] = deque()
        self.over = False  # the source has no more
        self.pace = 0.0  # requests a second of a replica, usually
        self.shares = repeats is None and len(self.replicas) > 1

    def results(self) -> Iterator[tuple[Any, Any]]:
        """(key, result) of every call, as they come."""
        if not self.repeats:
            self._look_ahead()
        while True:
            self._send()
            if self.over and not (self.running or self.ahead or self.lost):
                return
            waits = not self.running and all(replica.up for replica in self.replicas)
            assert not waits, "a call that waits, waits for another's result"
            yield from self._ended(self._next())

    def _send(self) -> None:
        """Give calls to all who are free."""
        for replica in self.replicas:
            if self.shares:
                self._look_ahead()
            if not replica.up or replica.sent is not None:
                continue
            if (piece := self._piece(replica)) is None:
                break
            replica.sent, replica.since = piece.call.on(replica.actor), time.monotonic()
            self.running[replica.sent] = piece, replica

    def _piece(self, replica: Replica) -> Piece | None:
        """What this replica is sent next; None where nothing may be."""
        if self.lost:
            piece = self.lost[0]
            if self.repeats:
                call = self.repeats.again(piece.job.key)
                if call is None:
                    return None
                piece.job.call = call
            return self.lost.popleft()
        if not self.shares:
            self._look_ahead()
        if not self.ahead:
            return None
        piece = self.ahead.popleft()
        if self.shares and piece.size - (share := self._share(piece, replica)) >= LEAST:
            self.ahead.appendleft(Piece(piece.job, piece.start + share, piece.end, piece.tries))
            piece.end = piece.start + share
        return piece

    def _share(self, piece: Piece, replica: Replica) -> int:
        """How many requests of a piece a replica is given: all, fewer where it is slow, so that it ends with the
        others; and at the end half of an equal share of what is left, so that the last pieces are small."""
        speed = replica.pace / self.pace if replica.pace else 1.0
        share = piece.size * max(SLOWEST, speed) if speed < SLOW else piece.size
        if self.over:
            left = piece.size + sum(other.size for other in self.ahead)
            share = min(share, left / (2 * len(self.replicas)) * min(1.0, speed))
        return max(LEAST, ceil(share))

    def _look_ahead(self) -> None:
        """Take calls from the source: some for each replica, to see its end in time; one where it is sent at once."""
        while not self.over and len(self.ahead) < (AHEAD * len(self.replicas) if self.shares else 1):
            following: Any = next(self.source, END)
            if following is None:
                return
            if following is END:
                self.over = True
            else:
                key, call = following
                self.ahead.append(Piece(Job(key, call, size(call)), 0, size(call)))

    def _next(self) -> Any:
        """The reference of a call that ended, or of a replica's answer that it is there."""
        while True:
            now, seconds = time.monotonic(), min(WATCH_SECONDS, self.engines.deadline_seconds)
            self._end_silent(now)
            for replica in self.replicas:
                if replica.up or replica.condemned:
                    continue
                if replica.coming is None and now - replica.asked > PAUSE_SECONDS:
                    replica.coming, replica.asked = replica.actor.ready.remote(), now
                elif replica.coming is None:
                    seconds = PAUSE_SECONDS
            waited = [*self.running, *(replica.coming for replica in self.replicas if replica.coming is not None)]
            if not waited:
                time.sleep(seconds)
                continue
            ended, _ = ray.wait(waited, num_returns=1, timeout=seconds)
            if ended:
                return ended[0]

    def _end_silent(self, now: float) -> None:
        """End replicas that neither finish a call nor load in their time, however busy the others are."""
        for replica in self.replicas:
            waited = [reference for reference in (replica.sent, replica.coming) if reference is not None][:1]
            began = replica.asked if replica.sent is None else replica.since
            # What ended while nobody looked, as during a long commit, is no silence.
            late = waited and now - began > self.engines.deadline_seconds
            if late and not ray.wait(waited, timeout=0)[0]:
                self.log.warning("an engine was silent for %g s: it is started again", self.engines.deadline_seconds)
                ray.kill(replica.actor, no_restart=False)
                replica.since = replica.asked = now
                replica.coming = None

    def _ended(self, reference: Any) -> Iterator[tuple[Any, Any]]:
        """Results that are whole with what ended."""
        if reference not in self.running:
            self._came(next(replica for replica in self.replicas if replica.coming == reference))
            return
        piece, replica = self.running[reference]
        seconds = time.monotonic() - replica.since
        del self.running[reference]
        replica.sent = None
        try:
            result = ray.get(reference)
        except RayTaskError as error:
            refuse_mistakes(error)
            replica.up, replica.condemned = False, True
            yield from self._blame(piece, replica, error)
        except GONE as error:
            replica.up = False
            yield from self._blame(piece, replica, error)
        else:
            if not self.over and seconds:
                replica.pace = piece.size / seconds
                self.pace += (replica.pace - self.pace) / min(len(self.replicas), 16) if self.pace else replica.pace
            yield from self._done(piece, result)
        if replica.condemned:
            replica.condemned, replica.over = False, replica.life
            with suppress(RayActorError):
                ray.kill(replica.actor, no_restart=False)

    def _done(self, piece: Piece, result: Any) -> Iterator[tuple[Any, Any]]:
        job = piece.job
        job.results.append((piece.start, result))
        job.left -= piece.size
        if not job.left:
            parts = sorted(job.results, key=lambda found: found[0])
            yield job.key, joined(parts) if len(parts) > 1 else result

    def _blame(self, piece: Piece, replica: Replica, error: Exception) -> Iterator[tuple[Any, Any]]:
        """A call whose engine died, or raised and is ended since nobody has checked the state it is left in: made again
        on whoever is free, and at last without what engines die of."""
        piece.tries += 1
        if piece.tries < SHARD_TRIES:
            self.log.warning("engine lost, a shard is sent again: %s", last_line(error))
            self._again(piece)
            return
        if self.repeats:
            self.repeats.lost(piece.job.key)
        key, condemned = piece.job.key, replica.condemned
        result, replica.actor = self.engines.isolated(key, piece.call, self.repeats, replica.actor, condemned)
        replica.up, replica.condemned, replica.coming = True, False, None
        yield from self._done(piece, result)

    def _again(self, piece: Piece) -> None:
        if self.repeats:
            self.repeats.lost(piece.job.key)
        self.lost.append(piece)

    def _came(self, replica: Replica) -> None:
        """A replica says that it is there, or that it never will be: then its room is gone, or could not start it."""
        reference, replica.coming = replica.coming, None
        try:
            life = ray.get(reference)
        except (ActorUnavailableError, ObjectLostError):
            return
        except RayActorError as error:
            try:
                actors = self.engines.actors()
            except ValueError:
                raise ValueError(f"engines: one did not start: {last_line(error)}") from error
            for other, actor in zip(self.replicas, actors, strict=True):
                if not other.up:
                    other.actor, other.coming = actor, None
            return
        # Until Ray has noticed, the life that was ended may still answer.
        if life != replica.over:
            replica.life, replica.up = life, True


def refuse_mistakes(error: Exception) -> None:
    """A user's mistake is no fault of the engine's that found it."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, ValueError):
        raise error.cause from None


def last_line(error: Exception) -> str:
    """What an engine died of, in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip()[:300]}"

"""A stage's access to engines: the run's engine room where there is one, its own engines where it runs alone."""

import json
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Protocol, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError

from infra.endpoint import EndpointSpec
from infra.engine import EngineSpec
from infra.engine_room import ROOM, open_room
from infra.models import ModelRef, local_folder
from infra.store import Store
from tasks.calls import Call
from tasks.connection import connected
from tasks.isolate import EngineLost, isolate, part
from tasks.stage import Stage

Key = TypeVar("Key")
# Requests queued at one engine: one runs, one waits, so that the store's latency is never the engine's.
IN_FLIGHT = 2
# How long a stage waits for an engine room that is starting, or starting again.
ROOM_SECONDS = 300.0
# How often one shard is tried whole, before the requests that its engine dies of are looked for.
SHARD_TRIES = 2
# How often engines are looked after while their results are waited for.
WATCH_SECONDS = 5.0
# What of a model's configuration decides whether weights fit.
SHAPE = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
END = object()


class Repeats(Protocol):
    """Who says whether a call, or its requests from one number to another, may be made again. None: not yet."""

    def lost(self, key: Any, start: int = 0, end: int | None = None) -> None: ...

    def again(self, key: Any, start: int = 0, end: int | None = None) -> Call | None: ...


class EnginePool:
    """The replicas of one engine."""

    def __init__(self, room: "EngineAccess", spec: EngineSpec | EndpointSpec) -> None:
        self.access, self.spec = room, spec
        self.names: list[str] = []
        self.heard: dict[Any, float] = {}  # by engine at work: when it last finished a call, or was given its first

    def actors(self) -> list[Any]:
        """Handles by name, looked up again after the room was replaced."""
        self.names = ray.get(self.access.room().acquire.remote(self.spec.model_dump()))
        return [ray.get_actor(name) for name in self.names]

    def map(
        self, calls: Iterable[tuple[Key, Call] | None], repeats: Repeats | None = None
    ) -> Iterator[tuple[Key, Any]]:
        """Results by key, as they come. None among the calls: the next one waits for a result.

        A call whose engine died or hung is made again; one whose engine raised costs that engine its life first, since
        a raised error leaves an engine in a state nobody has checked. Requests that an engine never survives are left
        out of the result: see ``tasks/isolate.py``. Where what is sent again has to be covered, ``repeats`` is told of
        what was lost, and makes the call anew.
        """
        source = iter(calls)
        actors = self.actors()
        idle = deque(actor for _ in range(IN_FLIGHT) for actor in actors)
        running: dict[Any, tuple[Key, Call, Any, int]] = {}
        lost: deque[tuple[Key, Call, int]] = deque()
        while True:
            following: Any = None
            while idle:
                if lost:
                    key, call, tries = lost[0]
                    repeated = repeats.again(key) if repeats else call
                    if repeated is None:
                        break
                    lost.popleft()
                    call = repeated
                else:
                    following = next(source, END)
                    if following is None or following is END:
                        break
                    (key, call), tries = following, 1
                actor = idle.popleft()
                running[call.on(actor)] = (key, call, actor, tries)
            if not running:
                assert following is END, "a call that waits, waits for another's result"
                return
            reference = self.finished({reference: entry[2] for reference, entry in running.items()})
            key, call, actor, tries = running.pop(reference)
            try:
                result = ray.get(reference)
            except (RayActorError, RayTaskError) as error:
                refuse_mistakes(error)
                if repeats:
                    repeats.lost(key)
                if tries == SHARD_TRIES:
                    idle.append(self.revived(actor, kill=isinstance(error, RayTaskError)))
                    result, reasons = isolate(call, partial(self.ask_part, key, call, repeats))
                    for reason in reasons:
                        self.access.stage.log.warning("a request is left out, its engine dies of it: %s", reason)
                    yield key, result
                    continue
                self.access.stage.log.warning("engine lost, a shard is sent again: %s", last_line(error))
                lost.append((key, call, tries + 1))
                idle.append(self.revived(actor, kill=isinstance(error, RayTaskError)))
                continue
            idle.append(actor)
            yield key, result

    def finished(self, running: dict[Any, Any]) -> Any:
        """The reference of a call that ended, of those that engines (the values) work on. An engine that ends none for
        its deadline is ended itself, and its calls with it."""
        while True:
            now = time.monotonic()
            self.heard = {actor: self.heard.get(actor, now) for actor in running.values()}
            ended, _ = ray.wait(list(running), num_returns=1, timeout=min(WATCH_SECONDS, self.spec.deadline_seconds))
            if ended:
                self.heard[running[ended[0]]] = time.monotonic()
                return ended[0]
            for actor, heard in self.heard.items():
                if time.monotonic() - heard > self.spec.deadline_seconds:
                    seconds = self.spec.deadline_seconds
                    self.access.stage.log.warning("an engine was silent for %g s: it is started again", seconds)
                    ray.kill(actor, no_restart=False)
                    self.heard[actor] = time.monotonic()

    def ask_part(self, key: Any, call: Call, repeats: Repeats | None, start: int, end: int) -> Any:
        """The requests of a call from ``start`` to ``end``, where they may be sent again."""
        own = repeats.again(key, start, end) if repeats else part(call, start, end)
        if own is None:
            raise RuntimeError("what is left to spend does not cover finding the request that its engine dies of")
        try:
            return self.ask(own)
        except EngineLost:
            if repeats:
                repeats.lost(key, start, end)
            raise

    def ask(self, call: Call) -> Any:
        """One call on one engine, beside what else that engine has to do; EngineLost where it does not survive it."""
        actor = self.actors()[0]
        # Another call may be before it: as long again.
        self.heard[actor] = time.monotonic() + self.spec.deadline_seconds
        try:
            return ray.get(self.finished({call.on(actor): actor}))
        except (RayActorError, RayTaskError) as error:
            refuse_mistakes(error)
            self.revived(actor, kill=isinstance(error, RayTaskError))
            raise EngineLost(last_line(error)) from error

    def revived(self, actor: Any, kill: bool) -> Any:
        """The same engine restarted by Ray, or, where its room died with it, the new room's."""
        deadline, life = time.monotonic() + ROOM_SECONDS, ""
        try:
            if kill:
                life = ray.get(actor.ready.remote(), timeout=ROOM_SECONDS)
                ray.kill(actor, no_restart=False)
            while time.monotonic() < deadline:
                # Until Ray has noticed, the life that ends may still answer, or nobody does.
                with suppress(ActorUnavailableError):
                    if ray.get(actor.ready.remote(), timeout=ROOM_SECONDS) != life:
                        return actor
                time.sleep(0.5)
        except (RayActorError, GetTimeoutError):
            pass
        return self.actors()[0]


def refuse_mistakes(error: Exception) -> None:
    """A user's mistake is no fault of the engine's that found it."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, ValueError):
        raise error.cause from None


def last_line(error: Exception) -> str:
    """What an engine died of, in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip()[:300]}"


class EngineAccess:
    """What ``engines`` yields."""

    def __init__(self, stage: Stage[Any]) -> None:
        self.stage = stage
        # A room that nobody holds a handle of ends, and its engines with it.
        self._own = open_room() if stage.spec.runtime.namespace is None else None

    def room(self) -> Any:
        """The run's room, waited for; alone, a room of this process's own."""
        if self._own is not None:
            return self._own
        deadline = time.monotonic() + ROOM_SECONDS
        while True:
            try:
                return ray.get_actor(ROOM)
            except ValueError:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no engine room in {self.stage.spec.runtime.namespace!r}") from None
                time.sleep(0.5)

    def pool(self, role: str, model: ModelRef) -> EnginePool:
        """Engines built for ``model`` with the role's settings. Requests may name other weights of its architecture."""
        settings, root = self.stage.spec.runtime.engines.get(role, {}), self.stage.spec.root
        if "endpoint" in settings:
            student = model_of(self.stage, "models", "student")
            return EnginePool(self, EndpointSpec(tokenizer=student, root=root, **settings["endpoint"]))
        return EnginePool(self, EngineSpec(model=model, root=root, **settings))


def release_engines(namespace: str) -> None:
    """End the engines of the run's room, if it has one, for a stage that needs their memory."""
    try:
        room = ray.get_actor(ROOM, namespace=namespace)
    except ValueError:
        return
    ray.get(room.release.remote())


@contextmanager
def engines(stage: Stage[Any]) -> Iterator[EngineAccess]:
    """Engines for the time of one stage."""
    with connected(stage.spec.runtime):
        yield EngineAccess(stage)


def served_by(store: Store, base: ModelRef, model: ModelRef) -> ModelRef:
    """The model whose engine serves these weights: ``base``, or their own where they are of another architecture."""
    if model.revision == base.revision:
        return base

    def shape(of: ModelRef) -> dict[str, Any]:
        config = json.loads((local_folder(store, of, weights=False) / "config.json").read_text())
        return {**config, **config.get("text_config", {})}

    ours, theirs = shape(base), shape(model)
    # Saving a model adds what its configuration left to defaults.
    same = all(ours[name] == theirs[name] for name in SHAPE if name in ours and name in theirs)
    return base if same else model


def model_of(stage: Stage[Any], input_name: str, key: str) -> ModelRef:
    """A model that an input manifest describes."""
    return ModelRef.model_validate(stage.input(input_name).facts["models"][key])

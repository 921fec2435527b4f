"""A stage's access to engines: the run's engine room where there is one, its own engines where it runs alone."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError

from infra.endpoint import EndpointSpec
from infra.engine import EngineSpec
from infra.engine_room import ROOM, open_room
from infra.models import ModelRef
from tasks.connection import connected
from tasks.stage import Stage

Key = TypeVar("Key")
# Requests queued at one engine: one runs, one waits, so that the store's latency is never the engine's.
IN_FLIGHT = 2
# How long a stage waits for an engine room that is starting, or starting again.
ROOM_SECONDS = 300.0
# How often one shard is tried before its error is the stage's.
SHARD_TRIES = 3
END = object()


@dataclass(frozen=True)
class Call:
    """One method call of an engine; the same call can be made again on another."""

    method: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def on(self, engine: Any) -> Any:
        """Ray's reference of the result."""
        return getattr(engine, self.method).remote(*self.arguments, **self.options)


class EnginePool:
    """The replicas of one engine."""

    def __init__(self, room: "EngineAccess", spec: EngineSpec | EndpointSpec) -> None:
        self.access, self.spec = room, spec
        self.names: list[str] = []

    def actors(self) -> list[Any]:
        """Handles by name, looked up again after the room was replaced."""
        self.names = ray.get(self.access.room().acquire.remote(self.spec.model_dump()))
        return [ray.get_actor(name) for name in self.names]

    def map(
        self, calls: Iterable[tuple[Key, Call] | None], again: Callable[[Key], Call | None] | None = None
    ) -> Iterator[tuple[Key, Any]]:
        """Results by key, as they come. None among the calls: the next one waits for a result.

        A call whose engine died is made again, or the one that ``again`` puts in its place, which may have to wait for
        a result too; one whose engine raised costs that engine its life first, since a raised error leaves an engine in
        a state nobody has checked.
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
                    replaced = again(key) if again else call
                    if replaced is None:
                        break
                    lost.popleft()
                    call = replaced
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
            (reference, *_), _ = ray.wait(list(running), num_returns=1)
            key, call, actor, tries = running.pop(reference)
            try:
                result = ray.get(reference)
            except (RayActorError, RayTaskError) as error:
                if isinstance(error, RayTaskError) and isinstance(error.cause, ValueError):
                    raise error.cause from None
                if tries == SHARD_TRIES:
                    raise
                self.access.stage.log.warning("engine lost, a shard is sent again: %s", last_line(error))
                lost.append((key, call, tries + 1))
                idle.append(self.revived(actor, kill=isinstance(error, RayTaskError)))
                continue
            idle.append(actor)
            yield key, result

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


def model_of(stage: Stage[Any], input_name: str, key: str) -> ModelRef:
    """A model that an input manifest describes."""
    return ModelRef.model_validate(stage.input(input_name).facts["models"][key])

"""A stage's access to engines: the run's engine room where there is one, its own engines where it runs alone."""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from infra.endpoint import EndpointSpec
from infra.engine import EngineSpec
from infra.engine_room import ROOM, open_room
from infra.models import ModelRef, local_folder
from infra.store import Store
from tasks.calls import Call
from tasks.connection import connected
from tasks.dispatch import Dispatch, Repeats, last_line, refuse_mistakes
from tasks.isolate import EngineLost, isolate, part
from tasks.stage import Stage

Key = TypeVar("Key")
# How long a stage waits for an engine room that is starting, or starting again.
ROOM_SECONDS = 300.0
# What of a model's configuration decides whether weights fit.
SHAPE = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


class EnginePool:
    """The replicas of one engine."""

    def __init__(self, room: "EngineAccess", spec: EngineSpec | EndpointSpec) -> None:
        self.access, self.spec = room, spec
        self.alone: Any = None  # the replica on which a call's deadly requests are looked for

    def actors(self) -> list[Any]:
        """Handles by name, looked up again after the room was replaced."""
        names = ray.get(self.access.room().acquire.remote(self.spec.model_dump()))
        return [ray.get_actor(name) for name in names]

    @property
    def deadline_seconds(self) -> float:
        return self.spec.deadline_seconds

    def map(
        self, calls: Iterable[tuple[Key, Call] | None], repeats: Repeats | None = None
    ) -> Iterator[tuple[Key, Any]]:
        """Results by key, as they come. None among the calls: the next one waits for a result.

        A call whose engine died or hung is made again; requests that an engine never survives are left out of the
        result: see ``tasks/dispatch.py`` and ``tasks/isolate.py``. Where what is sent again has to be covered,
        ``repeats`` is told of what was lost, and makes the call anew.
        """
        for found in Dispatch(self, calls, repeats, self.access.stage.log).results():
            yield found
            # An engine gets its next shard when its last one is recorded: a kill costs one of them, never two.
            self.access.stage.recorded()

    def isolated(self, key: Any, call: Call, repeats: Repeats | None, actor: Any, kill: bool) -> tuple[Any, Any]:
        """A call's result without what kills its engine, found on this replica, and the replica's handle."""
        self.alone = self.revived(actor, kill)
        result, reasons = isolate(call, partial(self.ask_part, key, call, repeats))
        for reason in reasons:
            self.access.stage.log.warning("a request is left out, its engine dies of it: %s", reason)
        return result, self.alone

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
        """One call on the replica that nothing else is sent to; EngineLost where it does not survive it."""
        try:
            return ray.get(call.on(self.alone), timeout=self.deadline_seconds)
        except GetTimeoutError as error:
            ray.kill(self.alone, no_restart=False)
            self.alone = self.revived(self.alone, kill=False)
            raise EngineLost(f"it was silent for {self.deadline_seconds:g} s") from error
        except (RayActorError, RayTaskError, ObjectLostError) as error:
            refuse_mistakes(error)
            self.alone = self.revived(self.alone, kill=isinstance(error, RayTaskError))
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


def release_engines(namespace: str | None, key: str | None = None) -> None:
    """End the engines of the run's room, if it has one, for a stage that needs their memory; or those of one spec."""
    try:
        room = ray.get_actor(ROOM, namespace=namespace)
    except ValueError:
        return
    ray.get(room.release.remote(key))


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

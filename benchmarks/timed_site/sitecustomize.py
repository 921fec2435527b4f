"""Loaded by every Python process of a run under ``benchmarks.parts``: what takes time notes its beginning and end."""

import builtins
import contextlib
import functools
import importlib.abc
import importlib.machinery
import json
import os
import sys
import threading
import time
from typing import Any

TRACE = os.environ.get("TIMED_TRACE")
IMPORT_SECONDS = 0.05
# By module: what is timed in it, and which part of a run's time that is.
TIMED = {
    "infra.engine": {
        "Engine.__init__": "start-up: engines",
        "Engine.generate": "engines",
        "Engine.choice": "engines",
        "Engine.mean_logprob": "engines",
    },
    "infra.manifest": {"commit_manifest": "store"},
    "tasks.loop": {"train": "training"},
    "tasks.connection": {"connected": "start-up: jobs"},
    "tasks.stage": dict.fromkeys(
        ("Stage.recorded", "Stage.done", "Stage.close_table", "Stage.write_table", "Stage.add_files"), "store"
    ),
}


class Timing(importlib.abc.MetaPathFinder):
    """Finds modules as usual, and has their functions timed once they are loaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in TIMED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec
        assert spec.loader
        load = spec.loader.exec_module

        def loaded(module: Any) -> None:
            load(module)
            for place, kind in TIMED[name].items():
                owner, _, attribute = place.rpartition(".")
                holder = getattr(module, owner) if owner else module
                setattr(holder, attribute, timed(kind, getattr(holder, attribute)))

        spec.loader.exec_module = loaded  # type: ignore[method-assign]
        return spec


def note(kind: str, start: float) -> None:
    with open(f"{TRACE}/{os.getpid()}.jsonl", "a") as file:
        file.write(json.dumps([kind, start, time.time()]) + "\n")


def timed(kind: str, function: Any) -> Any:
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        start = time.time()
        result = function(*arguments, **named)
        if isinstance(result, contextlib.AbstractContextManager):
            return entered(kind, result)
        note(kind, start)
        return result

    return call


@contextlib.contextmanager
def entered(kind: str, context: Any) -> Any:
    """The context, its beginning timed."""
    start = time.time()
    with context as value:
        note(kind, start)
        yield value


class Imports(threading.local):
    """Stands in for ``__import__``: imports that take longer than IMPORT_SECONDS are start-up, each with those that it
    makes itself."""

    inside = False
    original = staticmethod(builtins.__import__)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self.inside:
            return self.original(*arguments, **named)
        start, self.inside = time.time(), True
        try:
            return self.original(*arguments, **named)
        finally:
            self.inside = False
            if time.time() - start > IMPORT_SECONDS:
                note("start-up: imports", start)


if TRACE:
    builtins.__import__ = Imports()
    sys.meta_path.insert(0, Timing())

"""Loaded by every Python process of a run under ``benchmarks.chaos``: engines note each shard they begin."""

import importlib.abc
import importlib.machinery
import os
import sys
from typing import Any

TRACE = os.environ.get("CHAOS_TRACE")


class Noting(importlib.abc.MetaPathFinder):
    """Finds ``infra.engine`` as usual, and has its calls noted once it is loaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "infra.engine":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec
        assert spec.loader
        load = spec.loader.exec_module

        def loaded(module: Any) -> None:
            load(module)
            for method in ("generate", "choice", "mean_logprob"):
                setattr(module.Engine, method, noted(method, getattr(module.Engine, method)))

        spec.loader.exec_module = loaded  # type: ignore[method-assign]
        return spec


def noted(method: str, function: Any) -> Any:
    import functools
    import hashlib
    import json
    import time

    @functools.wraps(function)
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        asked = json.dumps([method, arguments, named], sort_keys=True, default=str)
        entry = {"at": time.time(), "engine": self.spec.key, "shard": hashlib.sha256(asked.encode()).hexdigest()}
        with open(f"{TRACE}/{os.getpid()}.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
        return function(self, *arguments, **named)

    return call


if TRACE:
    sys.meta_path.insert(0, Noting())

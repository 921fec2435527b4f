"""Running cells: whole runs, one after another, on one Ray head, one Prefect server and one engine room. What stays of
a cell is a small file of figures."""

import json
import shlex
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from benchmarks.conditions import conditions
from benchmarks.grid import Cell, settings
from infra.cluster import QUIET, Cluster, stop_jobs, submit
from infra.lease import RENEW_SECONDS, lease_path
from infra.parts import read_rows
from infra.store import Store, open_store
from tasks import value
from tasks.accounts import Manifests, fact, online_teacher_tokens, rows, teacher_queries
from tasks.config import RunConfig

ROOM = "methods"
LABELS = ("base", "teacher", "warmup", "final")


class Named(Protocol):
    """A cell of any grid."""

    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=Named)


@contextmanager
def workshop(root: str) -> Iterator[dict[str, Any]]:
    """Everything cells share, up until the end of the block. Yields the settings that bring a run onto it."""
    from flows.cli import prefect_server

    cluster, store, closed = Cluster(), open_store(root), threading.Event()

    def renew() -> None:
        count = 0
        while not closed.wait(RENEW_SECONDS):
            count += 1
            store.write(lease_path(ROOM), str(count).encode())

    with prefect_server(root) as ready:
        try:
            store.write(lease_path(ROOM), b"0")
            command = [sys.executable, "-m", "infra.engine_room", "--namespace", f"switchyard-{ROOM}"]
            command += ["--root", store.uri, "--lease", lease_path(ROOM)]
            environment = {**QUIET, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
            room = submit(cluster, f"{ROOM}-room", shlex.join(command), environment, {})
            threading.Thread(target=renew, daemon=True).start()
            ready()
            yield {"ray_address": cluster.address, "engine_room": ROOM}
            stop_jobs(cluster, [room.id])
        finally:
            closed.set()
            cluster.close()


def complete(name: str, data: dict[str, Any], root: str, shared: dict[str, Any]) -> tuple[dict[str, Any], Manifests]:
    """A run of these settings through the flow that users start: what is said of any cell, and the run's manifests.
    RuntimeError where it does not complete."""
    from flows.cli import start_flow
    from flows.record import load_record, run_id

    config = RunConfig.model_validate({**data, "resources": shared})
    began, before = time.monotonic(), conditions()
    state = start_flow(config, root, None, True)
    store = open_store(root)
    record = load_record(store, run_id(config))
    if not state.is_completed() or record is None:
        raise RuntimeError(f"cell {name} ended as {state.name}: {state.message}")
    manifests = record.manifests(store)
    return {
        "cell": name,
        "run": record.run,
        "manifest": next(stage.fingerprint for stage in record.stages if stage.name == "report"),
        "models": {role: model["revision"] for role, model in manifests["models"].facts["models"].items()},
        "conditions": before,
        "seconds": round(time.monotonic() - began, 1),
        "stages": {stage.name: None if stage.reused else round(stage.seconds, 1) for stage in record.stages},
        "steps": sum(manifests[name].facts["steps"] for name in ("warmup-train", "train") if name in manifests),
        "queries": teacher_queries(manifests),
        "teacher_tokens": value.teacher_tokens(manifests),
    }, manifests


def run(cell: Cell, shared: dict[str, Any], house: Path, root: str) -> dict[str, Any]:
    """A cell of the grid; its figures."""
    result, manifests = complete(cell.name, settings(cell, house), root, shared)
    arm = {"arm": vars(cell.arm), "seed": cell.seed, "changes": cell.arm.changes()}
    return {**result, **arm, **figures(open_store(root), manifests)}


def figures(store: Store, manifests: Manifests) -> dict[str, Any]:
    """What a run's tables say, small enough to be kept."""
    parts = [read_rows(store, manifests[name], "evaluations") for name in ("evaluate-before", "evaluate-after")]
    evaluated = pa.concat_tables(parts)
    # Of the whole run: the mean teacher answer says how long a task's answers are.
    lengths = evaluated.filter(pa.compute.equal(evaluated["label"], "teacher")).group_by("source")
    keeps = [manifests[name] for name in ("warmup-keep", "keep") if name in manifests]
    scores = pa.concat_tables([read_rows(store, keep, "scores", ["kept", "correct"]) for keep in keeps])
    train = manifests["train"].facts
    return {
        "correct": {label: marks(evaluated, label) for label in LABELS},
        "answer_tokens": {
            row["source"]: round(row["tokens_mean"], 1) for row in lengths.aggregate([("tokens", "mean")]).to_pylist()
        },
        "online_teacher_tokens": online_teacher_tokens(manifests),
        "annotations": {
            f"{'kept' if kept else 'dropped'}, {'right' if right else 'wrong'}": count
            for (kept, right), count in Counter(
                zip(scores["kept"].to_pylist(), scores["correct"].to_pylist(), strict=True)
            ).items()
        },
        "queried": dict(
            Counter(read_rows(store, manifests["select"], "selected", ["source"])["source"].to_pylist()).most_common()
        ),
        "candidates": rows(manifests, "select", "signals"),
        "intervention_rate": train.get("intervention_rate"),
        "agreeing_interventions": train.get("agreeing_interventions"),
        "by_position": positions(store, manifests),
        "response_length": fact(manifests, "train", "response_length"),
        "eos_rate": train.get("eos_rate"),
        "best_step": train.get("best_step"),
    }


def positions(store: Store, manifests: Manifests) -> list[float] | None:
    """Share of the tokens that the teacher decided, in tens of positions; None without rollouts."""
    table = read_rows(store, manifests["train"], "positions", ["position", "emitted", "interventions"]).to_pylist()
    emitted, decided = Counter[int](), Counter[int]()
    for row in table:
        emitted[row["position"] // 10] += row["emitted"]
        decided[row["position"] // 10] += row["interventions"]
    return [round(decided[ten] / emitted[ten], 4) for ten in sorted(emitted) if emitted[ten]] or None


def marks(evaluated: pa.Table, label: str) -> dict[str, list[str]]:
    """By task: for every sample a string of 1 (right) and 0 (wrong), one a problem in the order of their ids."""
    table = evaluated.filter(pa.compute.equal(evaluated["label"], label)).sort_by("prompt_id")
    found: dict[str, dict[int, str]] = {}
    for row in table.select(["source", "sample_index", "correct"]).to_pylist():
        samples = found.setdefault(row["source"], {})
        samples[row["sample_index"]] = samples.get(row["sample_index"], "") + ("1" if row["correct"] else "0")
    return {task: [samples[index] for index in sorted(samples)] for task, samples in sorted(found.items())}


def todo(cells: list[N], folder: Path) -> list[N]:
    """Cells whose result is not there yet."""
    return [cell for cell in cells if not (folder / f"{cell.name}.json").exists()]


def run_all(
    cells: list[N], perform: Callable[[N, dict[str, Any]], dict[str, Any]], root: str, folder: Path, seconds: float
) -> int:
    """Perform cells, with what they share, until the time is up; each result is written as soon as it is there.
    Returns how many were."""
    deadline, done = time.monotonic() + seconds, 0
    folder.mkdir(parents=True, exist_ok=True)
    with workshop(root) as shared:
        for cell in cells:
            if time.monotonic() > deadline:
                break
            result = perform(cell, shared)
            place = folder / f"{cell.name}.json"
            part = place.with_suffix(".part")
            part.write_text(json.dumps(result, indent=1) + "\n")
            part.rename(place)
            done += 1
            print(f"{cell.name}: {result['seconds']} s, {result['stages']}", flush=True)
    return done

"""Where a training row comes from: followed back through the tables of a run, or of the earlier run it was kept by."""

from collections.abc import Iterator
from typing import Any

import pyarrow.compute as pc

from flows.record import RunRecord
from flows.upkeep import all_runs
from infra.manifest import Manifest, load_manifest
from infra.parts import read_part, read_table
from infra.store import Store

Manifests = dict[str, Manifest]
KEEPS = ("keep", "warmup-keep")
# Where a training row's way can be followed: (stage, table, column that names it, what is found there).
WAY = (
    ("keep", "kept", "row_id", "training row"),
    ("keep", "scores", "sample_id", "TA's score"),
    ("annotate", "samples", "sample_id", "teacher's answer"),
    ("review", "samples", "sample_id", "teacher's answer"),
    ("mentor-keep", "kept", "row_id", "training row"),
    ("mentor-keep", "scores", "sample_id", "TA's score"),
    ("mentor-annotate", "samples", "sample_id", "mentor's answer"),
    ("student-sample", "samples", "sample_id", "student's answer that stands in"),
    ("auxiliary", "kept", "row_id", "training row"),
    ("auxiliary", "samples", "sample_id", "teacher's auxiliary target"),
)


def trace(store: Store, record: RunRecord, row_id: str) -> dict[str, Any]:
    """A training row's way back: its score, the teacher's answer, the signals that chose it, its prompt, its models;
    of a replayed row in the run that kept it. ValueError where the run has no such row."""
    manifests = record.manifests(store)
    if found := way_back(store, manifests, row_id):
        return found | {"seed": record.config["seed"]}
    if "replay" in manifests and lookup(store, manifests["replay"], "kept", "row_id", row_id):
        return replayed(store, manifests["replay"], row_id)
    tables = "ids stand in table kept of stages keep and replay"
    raise ValueError(f"{row_id!r}: run {record.run} trained on no such row; {tables}")


def replayed(store: Store, replay: Manifest, row_id: str) -> dict[str, Any]:
    """The way back of a row that a replay drew."""
    for path in (replay.inputs[name] for name in replay.settings["earlier"]):
        if store.exists(path) and lookup(store, load_manifest(store, path), "kept", "row_id", row_id):
            break
    else:
        raise ValueError(f"{row_id!r}: {replay.path} drew it from a table that is not there any more")
    made_by = next((run.run for run in all_runs(store) if path in run.touched.values()), None)
    manifests = lineage(store, path)
    seeds = (made.settings["seed"] for made in manifests.values() if "seed" in made.settings)
    found = {"replayed from": {"run": made_by, "manifest": path}, **way_back(store, manifests, row_id)}
    return found | {"seed": next(seeds, None)}


def lineage(store: Store, manifest_path: str) -> Manifests:
    """Everything a stage was made from within its run, by name; what is nearer is found first."""
    found: Manifests = {}
    waiting = [manifest_path]
    for path in waiting:
        name = path.split("/")[1]
        # A report among the inputs is of the run before, whose student this one began with.
        if name not in found and name != "report" and store.exists(path):
            found[name] = load_manifest(store, path)
            waiting += found[name].inputs.values()
    return found


def way_back(store: Store, manifests: Manifests, row_id: str) -> dict[str, Any]:
    """What the stages of one run know of a training row; empty where none of them kept it."""
    found: dict[str, Any] = {}
    for stage, table, column, what in WAY:
        for prefix in ("", "warmup-"):
            row = lookup(store, manifests.get(prefix + stage), table, column, row_id)
            if row:
                found[what] = row
    for stage in ("review", "warmup-review"):
        tables = manifests[stage].tables if stage in manifests else {}
        reviews = [lookup(store, manifests[stage], name, "sample_id", row_id) for name in tables if name != "samples"]
        if any(reviews):
            found["other teachers' scores"] = [row for row in reviews if row]
    if "training row" not in found:
        return {}
    prompt_id = found["training row"]["prompt_id"]
    others = [row for kept in KEEPS for row in rows(store, manifests.get(kept), "scores", "prompt_id", prompt_id)]
    found["other annotations"] = [row for row in others if row["sample_id"] != row_id]
    signal = lookup(store, manifests.get("select"), "signals", "prompt_id", prompt_id)
    if signal:
        found["signals"] = signal
    found["student's answers"] = list(rows(store, manifests.get("student-sample"), "samples", "prompt_id", prompt_id))
    for table in ("warmup", "candidates", "prompts"):
        row = lookup(store, manifests.get("prompts"), table, "prompt_id", prompt_id)
        if row:
            found["prompt"] = row
            break
    models = manifests["models"].facts["models"] if "models" in manifests else {}
    found["models"] = {role: f"{ref['name']} at {ref['revision']}" for role, ref in models.items()}
    return found


def rows(store: Store, manifest: Manifest | None, table: str, column: str, value: str) -> Iterator[dict[str, Any]]:
    """Rows of a table whose column has this value. Only that column is decoded, and what it is found in."""
    if manifest is None or table not in manifest.tables:
        return
    parts = manifest.tables[table].parts
    for part, keys in zip(parts, read_table(store, manifest, table, [column]), strict=True):
        here = pc.equal(keys[column], value)
        if pc.any(here).as_py():
            yield from read_part(store, part).filter(here).to_pylist()


def lookup(store: Store, manifest: Manifest | None, table: str, column: str, value: str) -> dict[str, Any] | None:
    return next(rows(store, manifest, table, column, value), None)

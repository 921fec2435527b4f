"""Looking after a store: is it whole, what is no longer needed, where does a row come from?"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from flows.record import RunRecord, load_record
from infra.audit import Damage, damages, forget, forget_object
from infra.manifest import DamagedError, Manifest, load_manifest, read_table
from infra.store import Store
from tasks.promoted import history, names


def all_runs(store: Store) -> list[RunRecord]:
    names = [path.split("/")[1] for path in store.list("runs") if path.endswith("/run.json")]
    return [record for record in (load_record(store, name) for name in names) if record]


def verify(store: Store, record: RunRecord, repair: bool) -> Iterator[tuple[str, list[Damage]]]:
    """(stage, its damages) for every stage of the run that is complete; with ``repair`` they are forgotten."""
    for stage in record.stages:
        try:
            manifest = load_manifest(store, stage.manifest)
        except FileNotFoundError:
            continue
        except DamagedError as error:
            if repair:
                forget_object(store, stage.manifest)
            yield stage.name, [Damage(error.what, stage.manifest)]
            continue
        found = list(damages(store, manifest))
        if found and repair:
            forget(store, manifest, found)
        yield stage.name, found


@dataclass
class Garbage:
    """What nothing points to, by stage folder; and what is kept."""

    folders: dict[str, list[str]] = field(default_factory=dict)
    kept: int = 0

    @property
    def paths(self) -> list[str]:
        return [path for paths in self.folders.values() for path in paths]


def garbage(store: Store) -> Garbage:
    """Stage folders that no run and no promotion, past or present, leads to.

    ValueError while a run is not ended: what it is about to write cannot be known.
    """
    live: set[str] = set()
    for record in all_runs(store):
        if record.state == "Running":
            raise ValueError(f"run {record.run} has not ended: end it, or run it again, before removing anything")
        for path in record.touched.values():
            reach(store, path, live)
    for path in promotions(store):
        reach(store, path, live)
    found = Garbage()
    for path in store.list("stages"):
        folder = "/".join(path.split("/")[:3])
        if folder in live:
            found.kept += 1
        else:
            found.folders.setdefault(folder, []).append(path)
    return found


def reach(store: Store, manifest_path: str, live: set[str]) -> None:
    """Add a stage's folder, and those of everything it was made from."""
    folder = manifest_path.rsplit("/", 1)[0]
    if folder in live:
        return
    live.add(folder)
    if store.exists(manifest_path):
        for path in load_manifest(store, manifest_path).inputs.values():
            reach(store, path, live)


def promotions(store: Store) -> Iterator[str]:
    """Manifests of the reports whose students were ever promoted."""
    for name in names(store):
        yield from {entry.manifest for entry in history(store, name)}


KEEPS = ("keep", "warmup-keep")
# Where a training row's way can be followed: (stage, table, column that names it, what is found there).
WAY = (
    ("keep", "kept", "row_id", "training row"),
    ("keep", "scores", "sample_id", "TA's score"),
    ("annotate", "samples", "sample_id", "teacher's answer"),
    ("student-sample", "samples", "sample_id", "student's answer that stands in"),
    ("auxiliary", "kept", "row_id", "training row"),
    ("auxiliary", "samples", "sample_id", "teacher's auxiliary target"),
    ("review", "samples", "sample_id", "teacher's answer"),
    ("mentor-keep", "kept", "row_id", "training row"),
    ("mentor-keep", "scores", "sample_id", "TA's score"),
    ("mentor-annotate", "samples", "sample_id", "mentor's answer"),
)


def trace(store: Store, record: RunRecord, row_id: str) -> dict[str, Any]:
    """A training row's way back: its score, the teacher's answer, the signals that chose it, its prompt, its models.

    ValueError where the run has no such row.
    """
    manifests = record.manifests(store)
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
        raise ValueError(f"{row_id!r}: run {record.run} trained on no such row; ids stand in table kept of stage keep")
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
    found["seed"] = record.config["seed"]
    return found


def rows(store: Store, manifest: Manifest | None, table: str, column: str, value: str) -> Iterator[dict[str, Any]]:
    """Rows of a table whose column has this value; one part is in memory at a time."""
    import pyarrow.compute as pc

    if manifest is None or table not in manifest.tables:
        return
    for part in read_table(store, manifest, table):
        yield from part.filter(pc.equal(part[column], value)).to_pylist()


def lookup(store: Store, manifest: Manifest | None, table: str, column: str, value: str) -> dict[str, Any] | None:
    return next(rows(store, manifest, table, column, value), None)

"""Looking after a store: is it whole, and what is no longer needed?"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from pydantic import BaseModel

from flows.record import RunRecord, load_record
from infra.audit import Damage, damages, forget, forget_object
from infra.manifest import DamagedError, load_manifest, parsed
from infra.store import Store, StorePath
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
        except ValueError as error:
            # Damaged, or written by another version.
            if repair:
                forget_object(store, stage.manifest)
            what = error.what if isinstance(error, DamagedError) else str(error).partition(": ")[2]
            yield stage.name, [Damage(what, stage.manifest)]
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
        """A manifest goes first: what follows it is then an unfinished stage, never a broken one."""
        paths = [path for paths in self.folders.values() for path in paths]
        return sorted(paths, key=lambda path: not path.endswith("/manifest.json"))


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


class Lineage(BaseModel):
    """What a stage's spec says of where it comes from."""

    inputs: dict[str, StorePath]


def reach(store: Store, manifest_path: str, live: set[str]) -> None:
    """Add a stage's folder, and those of everything it was made from."""
    folder = manifest_path.rsplit("/", 1)[0]
    if folder in live:
        return
    live.add(folder)
    for path in inputs_of(store, manifest_path, f"{folder}/spec.json").values():
        reach(store, path, live)


def inputs_of(store: Store, manifest_path: str, spec_path: str) -> dict[str, str]:
    """A stage's inputs by its manifest; where that is forgotten, or not written yet, by the spec it was begun with."""
    if store.exists(manifest_path):
        return load_manifest(store, manifest_path).inputs
    if store.exists(spec_path):
        return parsed(store, spec_path, store.read(spec_path), Lineage).inputs
    return {}


def promotions(store: Store) -> Iterator[str]:
    """Manifests of the reports whose students were ever promoted."""
    for name in names(store):
        yield from {entry.manifest for entry in history(store, name)}

"""Does the store still hold what manifests say? Every byte is read again, every row counted.

What is wrong can be forgotten: the manifest and the records of damaged parts go, so that the stage's next run makes
exactly these parts anew. The other parts stay.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from infra.manifest import File, Manifest, Part, Table, brief
from infra.parts import difference, record_path
from infra.store import Store


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was committed."""

    what: str
    path: str
    record: str | None = None  # the part's commit record; None for files of a folder


def damages(store: Store, manifest: Manifest) -> Iterator[Damage]:
    """Everything of a finished stage that is missing, changed or miscounted."""
    for name, table in manifest.tables.items():
        for part in table.parts:
            what = part_damage(store, table, part)
            if what:
                yield Damage(what, part.path, record_path(manifest.folder, name, part.shard))
    for files in manifest.files.values():
        for file in files:
            what = file_damage(store, file)
            if what:
                yield Damage(what, file.path)


def file_damage(store: Store, file: File) -> str:
    """What is wrong with a file, or nothing. It may be larger than memory."""
    try:
        return changed(file, *store.digest(file.path))
    except FileNotFoundError:
        return "is missing"


def changed(object_: File | Part, size: int, sha256: str) -> str:
    """In what an object's bytes are not what was committed, or nothing."""
    if size != object_.bytes:
        return f"has {size:,} bytes instead of {object_.bytes:,}"
    return "" if sha256 == object_.sha256 else "has other bytes than were committed"


def part_damage(store: Store, table: Table, part: Part) -> str:
    """What is wrong with a part, or nothing."""
    try:
        data = store.read(part.path)
    except FileNotFoundError:
        return "is missing"
    if what := changed(part, len(data), hashlib.sha256(data).hexdigest()):
        return what
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        return f"is no Parquet ({brief(error)})"
    if file.metadata.num_rows != part.rows:
        return f"holds {file.metadata.num_rows:,} rows instead of {part.rows:,}"
    differs = difference(file.schema_arrow, table.arrow_schema)
    return f"has another schema than its table ({differs})" if differs else ""


def forget(store: Store, manifest: Manifest, found: list[Damage]) -> None:
    """Let the stage's next run make again what is damaged. The manifest goes first: a stage without is unfinished."""
    store.delete(manifest.path)
    for damage in found:
        if damage.record:
            store.delete(damage.record)
        store.delete(damage.path)


def forget_object(store: Store, path: str) -> None:
    """The same for one object that a reader found damaged: a part, a commit record, or the manifest itself."""
    *place, table, name = path.split("/")
    if name == "manifest.json":
        store.delete(path)
        return
    folder = "/".join(place)
    store.delete(f"{folder}/manifest.json")
    if name.startswith("part-"):
        store.delete(record_path(folder, table, int(name.split("-")[1])))
    store.delete(path)

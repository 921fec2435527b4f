"""Does the store still hold what manifests say? Every byte is read again, every row counted.

What is wrong can be forgotten: the manifest and the records of damaged parts go, so that the stage's next run makes
exactly these parts anew. The other parts stay.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from infra.manifest import Manifest, Part, Table, brief, record_path
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
            what = changed(store, file.path, file.bytes, file.sha256)[0]
            if what:
                yield Damage(what, file.path)


def changed(store: Store, path: str, size: int, digest: str) -> tuple[str, bytes]:
    """(What is wrong with an object, or nothing; its bytes)."""
    try:
        data = store.read(path)
    except FileNotFoundError:
        return "is missing", b""
    if len(data) != size:
        return f"has {len(data):,} bytes instead of {size:,}", data
    return ("" if hashlib.sha256(data).hexdigest() == digest else "has other bytes than were committed"), data


def part_damage(store: Store, table: Table, part: Part) -> str:
    """What is wrong with a part, or nothing."""
    what, data = changed(store, part.path, part.bytes, part.sha256)
    if what:
        return what
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        return f"is no Parquet ({brief(error)})"
    if file.metadata.num_rows != part.rows:
        return f"holds {file.metadata.num_rows:,} rows instead of {part.rows:,}"
    if not file.schema_arrow.equals(table.arrow_schema):
        return "has another schema than its table"
    return ""


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

"""The manifest: what a finished stage made. It exists if and only if the stage is complete.

Layout of a stage's output, below the store's root::

    stages/<stage>/<fingerprint>/
        <table>/part-00003-<hash>.parquet    a part, named by its content
        <table>/00003.json                   its commit record: only recorded parts count
        files/…                              models and pages, if the stage makes any
        manifest.json                        written last, exclusively

A part is trusted by its record alone, so a file cut off by a crash is never read, and two runs of one stage cannot
spoil each other: the second to record a shard adopts the first's part.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, Field, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic_core import to_json

from infra.store import Store, StorePath

FORMAT = 1
# Made once: every row's id is written by it.
CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
# Rows of one row group: small enough that a training reader holds little, large enough to compress.
ROW_GROUP = 4096
# Commit records that are read at once.
READERS = 16
# And so many are under way.
BATCH = 256
SEAL = re.compile(rb'{\n "sha256": "([0-9a-f]{64})",')
Model = TypeVar("Model", bound=BaseModel)


class Part(BaseModel):
    """One committed Parquet file of a table."""

    # Of the table that the part was found in, for its readers to check; None where it was found by its record.
    _schema: pa.Schema | None = PrivateAttr(None)
    shard: int = Field(ge=0)
    path: StorePath
    rows: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str


class Table(BaseModel):
    """A table: its schema (Arrow IPC, hex, so that an empty table keeps its types) and its parts in shard order."""

    schema_hex: str
    parts: list[Part]

    @field_validator("schema_hex")
    @classmethod
    def _is_a_schema(cls, value: str) -> str:
        try:
            pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(value)))
        except (ValueError, OSError, pa.ArrowException) as error:
            raise ValueError(f"no schema: {error}") from None
        return value

    @model_validator(mode="after")
    def _tell_its_parts(self) -> Self:
        for part in self.parts:
            part._schema = self.arrow_schema
        return self

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @cached_property
    def by_shard(self) -> dict[int, Part]:
        """Its parts by the shard they are of."""
        return {part.shard: part for part in self.parts}

    @cached_property
    def arrow_schema(self) -> pa.Schema:
        return pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(self.schema_hex)))


class File(BaseModel):
    """One file of a folder that the stage made, such as a model's weights."""

    path: StorePath
    bytes: int = Field(ge=0)
    sha256: str


class Manifest(BaseModel):
    """Everything later stages, and people, need to know of a finished stage."""

    format: int = FORMAT
    stage: str
    module: str
    version: int
    fingerprint: str
    settings: dict[str, Any]
    inputs: dict[str, StorePath]
    tables: dict[str, Table] = Field(default_factory=dict)
    files: dict[str, list[File]] = Field(default_factory=dict)
    facts: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    started: datetime = Field(default_factory=lambda: datetime.now(UTC))
    finished: datetime | None = None

    @property
    def folder(self) -> str:
        return stage_folder(self.stage, self.fingerprint)

    @property
    def path(self) -> str:
        return f"{self.folder}/manifest.json"

    @property
    def seconds(self) -> float:
        return (self.finished - self.started).total_seconds() if self.finished else 0.0


def stage_folder(stage: str, fingerprint: str) -> str:
    return f"stages/{stage}/{fingerprint}"


def fingerprint(value: Any) -> str:
    """16 hex digits of SHA-256 over canonical JSON."""
    return hashlib.sha256(CANONICAL.encode(value).encode()).hexdigest()[:16]


class DamagedError(ValueError):
    """An object of the store is missing, or is not what was committed."""

    def __init__(self, location: str, path: str, what: str) -> None:
        super().__init__(location, path, what)  # all of them, or it could not travel between processes
        self.path, self.what = path, what

    def __str__(self) -> str:
        return f"{self.args[0]} {self.args[2]}"


def sealed(record: BaseModel) -> bytes:
    """A small object as it is stored: JSON that begins with a hash of all that follows."""
    body = memoryview(to_json(record, indent=1))[1:]
    return b"".join((b'{\n "sha256": "', hashlib.sha256(body).hexdigest().encode(), b'",', body))


def parsed(store: Store, path: str, data: bytes, kind: type[Model]) -> Model:
    """A small object of the store; DamagedError where its bytes are not one. Those of older versions have no hash."""
    seal = SEAL.match(data)
    if seal and hashlib.sha256(data[seal.end() :]).hexdigest().encode() != seal[1]:
        raise DamagedError(store.location(path), path, "has other bytes than were committed")
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        said = " ".join(f"{field}: {first['msg']}".removeprefix(": ").split())
        raise DamagedError(store.location(path), path, f"is damaged ({said})") from None


def load_manifest(store: Store, path: str) -> Manifest:
    """The manifest at ``path``; FileNotFoundError where the stage is not complete, DamagedError where it is not what
    was committed, ValueError for another format."""
    manifest = parsed(store, path, store.read(path), Manifest)
    if manifest.format != FORMAT:
        raise ValueError(f"{path}: manifest format {manifest.format}, this version reads {FORMAT}; redo the stage")
    own = manifest.path == path and all(place.startswith(f"{manifest.folder}/") for place in places(manifest))
    if not own:
        raise DamagedError(store.location(path), path, "is damaged (it is of another stage, or names another's files)")
    return manifest


def brief(error: Exception) -> str:
    """What a library says of bytes that it cannot read, in a line."""
    return " ".join(str(error).split())[:200]


def places(manifest: Manifest) -> Iterator[str]:
    """Of everything that the stage made."""
    for table in manifest.tables.values():
        yield from (part.path for part in table.parts)
    for files in manifest.files.values():
        yield from (file.path for file in files)


def commit_manifest(store: Store, manifest: Manifest) -> Manifest:
    """Write the manifest exclusively; where another run was first, its manifest is the result."""
    manifest.finished = datetime.now(UTC)
    if store.create(manifest.path, sealed(manifest)):
        return manifest
    return load_manifest(store, manifest.path)


def difference(schema: pa.Schema, wanted: pa.Schema) -> str:
    """In what a schema is not the one that is wanted, in words; empty where it is. Metadata does not count."""
    if schema.equals(wanted):
        return ""
    found, right = ({field.name: field for field in side} for side in (schema, wanted))
    for name in [*right, *found]:
        if name not in found:
            return f"no column {name!r}"
        if name not in right:
            return f"a column {name!r} too many"
        if not found[name].equals(right[name]):
            return f"column {name!r} {found[name].type} instead of {right[name].type}"
    return "columns in another order"


def record_path(folder: str, table: str, shard: int) -> str:
    return f"{folder}/{table}/{shard:05d}.json"


def encode_part(rows: pa.Table) -> pa.Buffer:
    """A part's bytes."""
    sink = pa.BufferOutputStream()
    # Bytes are compressed already: a dictionary and statistics of them would double them.
    plain = [field.name for field in rows.schema if not pa.types.is_binary(field.type)]
    pq.write_table(
        rows, sink, compression="zstd", row_group_size=ROW_GROUP, use_dictionary=plain, write_statistics=plain
    )
    return sink.getvalue()


def record_part(store: Store, folder: str, table: str, shard: int, rows: int, data: pa.Buffer) -> Part:
    """Write a part of so many rows and its commit record; where the shard is recorded already, the recorded part is
    the result."""
    digest = hashlib.sha256(data).hexdigest()
    path = f"{folder}/{table}/part-{shard:05d}-{digest[:16]}.parquet"
    part = Part(shard=shard, path=path, rows=rows, bytes=len(data), sha256=digest)
    record = record_path(folder, table, shard)
    store.write(path, data)
    if store.create(record, part.model_dump_json().encode()):
        return part
    first = read_record(store, record)
    if first.path != path:
        store.delete(path)
    return first


def commit_part(store: Store, folder: str, table: str, shard: int, rows: pa.Table) -> Part:
    """Encode a part and record it."""
    return record_part(store, folder, table, shard, rows.num_rows, encode_part(rows))


class Committer:
    """Commits the parts of one folder one behind the other: while one is hashed and synced, the next is encoded.

    An error of the one is raised by what comes next, be it ``commit`` or ``wait``.
    """

    def __init__(self, store: Store, folder: str) -> None:
        self.store, self.folder = store, folder
        self._thread = ThreadPoolExecutor(1, "commit")
        self._stored: tuple[str, Future[Part]] | None = None
        self._recorded: dict[str, dict[int, Part]] = {}
        self._schemas: dict[str, pa.Schema] = {}

    def _check(self, table: str, schema: pa.Schema) -> None:
        """ValueError where another part of the table has another schema."""
        differs = difference(self._schemas.setdefault(table, schema), schema)
        if differs:
            raise ValueError(f"table {table} of {self.folder}: its parts differ: {differs}; give them one schema")

    def commit(self, table: str, shard: int, rows: pa.Table) -> None:
        self._check(table, rows.schema)
        data = encode_part(rows)
        self.wait()
        stored = self._thread.submit(record_part, self.store, self.folder, table, shard, rows.num_rows, data)
        self._stored = table, stored

    def wait(self) -> None:
        """Return when everything is recorded."""
        pending, self._stored = self._stored, None
        if pending:
            table, stored = pending
            part = stored.result()
            self._recorded.setdefault(table, {})[part.shard] = part

    def close(self, table: str, schema: pa.Schema) -> Table:
        """The table of all recorded parts: the records of earlier attempts are read, those of this one are known.

        ValueError where a part that was committed here has another schema. One of an earlier attempt its readers find.
        """
        self.wait()
        self._check(table, schema)
        return close_table(self.store, self.folder, table, schema, self._recorded.pop(table, {}))


def read_record(store: Store, path: str) -> Part:
    """A part as its commit record has it; DamagedError where that is not what was written."""
    part = parsed(store, path, store.read(path), Part)
    folder, table, _ = path.rsplit("/", 2)
    if record_path(folder, table, part.shard) != path or not part.path.startswith(f"{folder}/{table}/part-"):
        raise DamagedError(store.location(path), path, "is damaged (it is another part's)")
    return part


def committed_parts(store: Store, folder: str, table: str, known: dict[int, Part] | None = None) -> dict[int, Part]:
    """Recorded parts of a table by shard; the records of ``known`` ones are not read again."""
    parts = dict(known or {})
    seen = {record_path(folder, table, shard) for shard in parts}
    records = [path for path in store.list(f"{folder}/{table}") if path.endswith(".json") and path not in seen]
    # One request each: tables of many parts would wait for one after the other.
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(records), BATCH):
            batch = pool.map(partial(read_record, store), records[start : start + BATCH])
            parts.update((part.shard, part) for part in batch)
    return parts


def close_table(
    store: Store, folder: str, table: str, schema: pa.Schema, known: dict[int, Part] | None = None
) -> Table:
    """The table of all recorded parts, once every shard is recorded; the records of ``known`` ones are not read again.

    Parts that a crash or a lost race left unrecorded are removed: readers of ``*.parquet`` would count rows twice.
    """
    parts = committed_parts(store, folder, table, known).values()
    recorded = {part.path for part in parts}
    for path in list(store.list(f"{folder}/{table}")):
        if path.endswith(".parquet") and path not in recorded:
            store.delete(path)
    return table_entry(schema, parts)


def part_bytes(store: Store, part: Part) -> bytes:
    """A part as it is stored; DamagedError where that is not what was committed."""
    try:
        data = store.read(part.path)
    except FileNotFoundError:
        raise DamagedError(store.location(part.path), part.path, "is missing") from None
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise DamagedError(store.location(part.path), part.path, "has other bytes than were committed")
    return data


def decode_part(store: Store, part: Part, data: bytes, columns: list[str] | None = None) -> pa.Table:
    """The rows in a part's bytes; DamagedError where there are none, or they are not of its table; ValueError for a
    column that it has not."""
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        schema = file.schema_arrow
        differs = difference(schema, part._schema) if part._schema is not None else ""
        unknown = set(columns or ()) - set(schema.names)
        if not differs and not unknown:
            return file.read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(store.location(part.path), part.path, f"is no Parquet ({brief(error)})") from None
    if differs:
        raise DamagedError(store.location(part.path), part.path, f"has another schema than its table ({differs})")
    raise ValueError(f"{store.location(part.path)} has no column {', '.join(sorted(unknown))}; redo the stage")


def read_part(store: Store, part: Part, columns: list[str] | None = None) -> pa.Table:
    """A part's rows; DamagedError where they cannot be trusted."""
    return decode_part(store, part, part_bytes(store, part), columns)


def read_table(store: Store, manifest: Manifest, table: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """A table part by part, in shard order. While one is worked on the next is fetched and hashed: the rows of one part
    and the bytes of another are in memory at a time."""
    if table not in manifest.tables:
        known = ", ".join(manifest.tables) or "none"
        raise ValueError(f"{manifest.path} has no table {table!r}; it has {known}")
    with ThreadPoolExecutor(1, "fetch") as thread:
        fetched: tuple[Part, Future[bytes]] | None = None
        for part in [*manifest.tables[table].parts, None]:
            before, fetched = fetched, (part, thread.submit(part_bytes, store, part)) if part else None
            if before:
                yield decode_part(store, before[0], before[1].result(), columns)


def read_rows(store: Store, manifest: Manifest, table: str, columns: list[str] | None = None) -> pa.Table:
    """A whole table in memory: for tables that are small by nature (signals, metrics, a budget's rows)."""
    schema = manifest.tables[table].arrow_schema
    if columns:
        schema = pa.schema([schema.field(name) for name in columns])
    return pa.concat_tables([schema.empty_table(), *read_table(store, manifest, table, columns)])


def commit_files(store: Store, folder: Path, prefix: str) -> list[File]:
    """Copy a local folder below ``prefix``; its files with size and hash, as they were before the copy."""
    files = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        path = f"{prefix}/{file.relative_to(folder).as_posix()}"
        files.append(File(path=path, bytes=file.stat().st_size, sha256=digest))
    store.upload(folder, prefix)
    return files


def table_entry(schema: pa.Schema, parts: Iterable[Part]) -> Table:
    return Table(schema_hex=schema.serialize().to_pybytes().hex(), parts=sorted(parts, key=lambda part: part.shard))

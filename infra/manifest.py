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
from dataclasses import field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import from_json, to_json

from infra.store import Store, StorePath

FORMAT = 1
# Made once: every row's id is written by it.
CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
SEAL = re.compile(rb'{\n "sha256": "([0-9a-f]{64})",')
Model = TypeVar("Model")
Count = Annotated[int, Field(ge=0)]


@dataclass(slots=True, config=ConfigDict(arbitrary_types_allowed=True))
class Part:
    """One committed Parquet file of a table. A data set has tens of thousands: half a KB each, a third of a model's."""

    shard: Count
    path: StorePath
    rows: Count
    bytes: Count
    sha256: str
    # Of the table that the part was found in, for its readers to check; None where it was found by its record.
    schema: Annotated[pa.Schema | None, Field(exclude=True)] = field(
        default=None, init=False, repr=False, compare=False
    )


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
            part.schema = self.arrow_schema
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
    bytes: Count
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
        return TypeAdapter(kind).validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        said = " ".join(f"{field}: {first['msg']}".removeprefix(": ").split())
        raise DamagedError(store.location(path), path, f"is damaged ({said})") from None


def load_manifest(store: Store, path: str) -> Manifest:
    """The manifest at ``path``; FileNotFoundError where the stage is not complete, DamagedError where it is not what
    was committed, ValueError for another format."""
    data = store.read(path)
    manifest = parsed(store, path, data, Manifest)
    if not SEAL.match(data) and (unknown := from_json(data).keys() - Manifest.model_fields.keys()):
        # Perhaps the hash itself, its name damaged.
        raise DamagedError(store.location(path), path, f"is damaged (it has a field {min(unknown)[:80]!r})")
    if manifest.format != FORMAT:
        raise ValueError(f"{path}: has manifest format {manifest.format}, this version reads {FORMAT}")
    folder = manifest.folder
    named = all(
        part.path == part_path(folder, name, part.shard, part.sha256)
        for name, table in manifest.tables.items()
        for part in table.parts
    )
    # Not a part among the files: to repair a damaged file would remove it, and leave its record.
    filed = all(file.path.startswith(f"{folder}/files/") for files in manifest.files.values() for file in files)
    if manifest.path != path or not named or not filed:
        raise DamagedError(store.location(path), path, "is damaged (it is of another stage, or names another's files)")
    return manifest


def brief(error: Exception) -> str:
    """What a library says of bytes that it cannot read, in a line."""
    return " ".join(str(error).split())[:200]


def part_path(folder: str, table: str, shard: int, sha256: str) -> str:
    """Where the part of a shard lies that has these bytes."""
    return f"{folder}/{table}/part-{shard:05d}-{sha256[:16]}.parquet"


def commit_manifest(store: Store, manifest: Manifest) -> Manifest:
    """Write the manifest exclusively; where another run was first, its manifest is the result."""
    manifest.finished = datetime.now(UTC)
    if store.create(manifest.path, sealed(manifest)):
        return manifest
    return load_manifest(store, manifest.path)


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

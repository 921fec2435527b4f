"""Parts of tables: committed, closed and read. ``infra.manifest`` has their layout and what is written down of them."""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import to_json

from infra.manifest import DamagedError, Manifest, Part, Table, brief, parsed, part_path
from infra.store import Store

# Training and all others read whole parts and hold one: a part is a shard's rows, thousands at most. Row groups bound
# what readers outside hold of parts that a user made large.
ROW_GROUP = 4096
# Commit records that are read at once.
READERS = 16
# And so many are under way.
BATCH = 256


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
    path = part_path(folder, table, shard, digest)
    part = Part(shard=shard, path=path, rows=rows, bytes=len(data), sha256=digest)
    record = record_path(folder, table, shard)
    store.write(path, data)
    if store.create(record, to_json(part)):
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
    own = part_path(folder, table, part.shard, part.sha256)
    if record_path(folder, table, part.shard) != path or part.path != own:
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
        differs = difference(schema, part.schema) if part.schema is not None else ""
        unknown = set(columns or ()) - set(schema.names)
        if not differs and not unknown:
            return file.read(columns=columns)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
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


def table_entry(schema: pa.Schema, parts: Iterable[Part]) -> Table:
    return Table(schema_hex=schema.serialize().to_pybytes().hex(), parts=sorted(parts, key=lambda part: part.shard))

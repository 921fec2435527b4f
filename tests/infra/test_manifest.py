"""Commit protocol of parts and manifests: recorded or not there, first or adopted, intact or refused."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from infra import manifest as m
from infra import parts
from infra.audit import damages
from infra.store import LocalStore, Store

ROWS = pa.table({"id": ["a", "b", "c"], "n": pa.array([1, 2, 3], pa.int32())})


def make(store: Store, **fields: object) -> m.Manifest:
    base = {"stage": "s", "module": "tasks.x", "version": 1, "fingerprint": "f", "settings": {}, "inputs": {}}
    return m.Manifest(**{**base, **fields})  # type: ignore[arg-type]


def test_a_part_round_trips(store: Store) -> None:
    part = parts.commit_part(store, "stages/s/f", "t", 3, ROWS)
    assert part.rows == 3
    assert part.path.startswith("stages/s/f/t/part-00003-")
    assert parts.read_part(store, part).equals(ROWS)
    assert parts.read_part(store, part, ["n"]).column_names == ["n"]


def test_the_second_to_commit_a_shard_adopts_the_first(store: Store) -> None:
    first = parts.commit_part(store, "stages/s/f", "t", 0, ROWS)
    second = parts.commit_part(store, "stages/s/f", "t", 0, ROWS.slice(0, 1))
    assert second == first
    assert parts.committed_parts(store, "stages/s/f", "t") == {0: first}


def test_an_unrecorded_part_does_not_count(store: Store) -> None:
    part = parts.commit_part(store, "stages/s/f", "t", 0, ROWS)
    store.delete(parts.record_path("stages/s/f", "t", 0))
    assert parts.committed_parts(store, "stages/s/f", "t") == {}
    assert store.exists(part.path)


def test_a_closed_table_has_no_parts_but_the_recorded(store: Store) -> None:
    part = parts.commit_part(store, "stages/s/f", "t", 0, ROWS)
    # A crash between part and record leaves this; so does another process between both.
    store.write("stages/s/f/t/part-00001-0123456789abcdef.parquet", b"unrecorded")
    table = parts.close_table(store, "stages/s/f", "t", ROWS.schema)
    assert table == parts.table_entry(ROWS.schema, [part])
    assert list(store.list("stages/s/f")) == ["stages/s/f/t/00000.json", part.path]


RACER = """
import json, sys
import pyarrow as pa
from infra import manifest as m
from infra import parts
from infra.audit import damages
from infra.store import open_store
store, own = open_store(sys.argv[1]), sys.argv[2]
manifest = m.Manifest(stage="s", module="m", version=1, fingerprint="f", settings={}, inputs={}, facts={"winner": own})
print("ready", flush=True)
sys.stdin.readline()
schema = pa.schema([("writer", pa.string())])
for shard in range(12):
    parts.commit_part(store, manifest.folder, "t", shard, pa.table({"writer": [own] * 5}, schema=schema))
manifest.tables["t"] = parts.close_table(store, manifest.folder, "t", schema)
print(m.commit_manifest(store, manifest).model_dump_json(), flush=True)
"""


def test_two_processes_that_race_for_a_stage_end_with_one_result(store: Store) -> None:
    command = [sys.executable, "-c", RACER, store.uri]
    racers = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]
    for racer in racers:
        assert racer.stdout
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin
        racer.stdin.write("go\n")
        racer.stdin.flush()
    first, second = (m.Manifest.model_validate_json(racer.communicate()[0]) for racer in racers)
    assert [racer.returncode for racer in racers] == [0, 0]
    assert first == second
    assert list(damages(store, first)) == []
    assert parts.read_rows(store, first, "t").num_rows == 60
    # Nothing of the loser's is left.
    left = {part.path for part in first.tables["t"].parts}
    assert {path for path in store.list(f"{first.folder}/t") if path.endswith(".parquet")} == left


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:50] + bytes([b[50] ^ 1]) + b[51:], lambda b: b""])
def test_a_damaged_part_is_refused(store: Store, damage: object) -> None:
    part = parts.commit_part(store, "stages/s/f", "t", 0, ROWS)
    store.write(part.path, damage(store.read(part.path)))  # type: ignore[operator]
    with pytest.raises(ValueError, match="has other bytes"):
        parts.read_part(store, part)


def test_the_first_manifest_stands(store: Store) -> None:
    first = m.commit_manifest(store, make(store, facts={"winner": 1}))
    second = m.commit_manifest(store, make(store, facts={"winner": 2}))
    assert first.facts == second.facts == {"winner": 1}
    assert m.load_manifest(store, first.path).finished is not None


def test_an_empty_table_keeps_its_types(store: Store) -> None:
    manifest = make(store)
    manifest.tables["t"] = parts.table_entry(ROWS.schema, [])
    again = m.load_manifest(store, m.commit_manifest(store, manifest).path)
    assert parts.read_rows(store, again, "t").schema == ROWS.schema
    assert parts.read_rows(store, again, "t", ["n"]).schema.names == ["n"]


def test_tables_are_read_in_shard_order(store: Store) -> None:
    manifest = make(store)
    made = [parts.commit_part(store, manifest.folder, "t", shard, ROWS.slice(shard, 1)) for shard in (2, 0, 1)]
    manifest.tables["t"] = parts.table_entry(ROWS.schema, made)
    assert parts.read_rows(store, manifest, "t").equals(ROWS)
    with pytest.raises(ValueError, match="no table 'u'"):
        list(parts.read_table(store, manifest, "u"))


OTHERS = {
    "column 'n' too many": ROWS.select(["id"]),
    "no column 'more'": ROWS.append_column("more", pa.array([True] * 3)),
    "column 'n' int32 instead of int64": ROWS.set_column(1, "n", ROWS["n"].cast(pa.int64())),
    "columns in another order": ROWS.select(["n", "id"]),
}


@pytest.mark.parametrize(("said", "other"), OTHERS.items(), ids=list(OTHERS))
def test_a_part_of_another_schema_is_damaged(tmp_path: Path, said: str, other: pa.Table) -> None:
    store, manifest = LocalStore(tmp_path), make(LocalStore(tmp_path))
    part = parts.commit_part(store, manifest.folder, "t", 0, ROWS)
    manifest.tables["t"] = parts.table_entry(other.schema, [part])
    again = m.load_manifest(store, m.commit_manifest(store, manifest).path)
    with pytest.raises(m.DamagedError, match=rf"has another schema than its table .*{said}"):
        parts.read_rows(store, again, "t")
    with pytest.raises(m.DamagedError, match=said):
        parts.read_part(store, again.tables["t"].parts[0], ["id"])


def test_metadata_is_no_part_of_a_schema_and_unknown_columns_are_refused(tmp_path: Path) -> None:
    store, manifest = LocalStore(tmp_path), make(LocalStore(tmp_path))
    committer = parts.Committer(store, manifest.folder)
    committer.commit("t", 0, ROWS.replace_schema_metadata({"from": "somewhere"}))
    manifest.tables["t"] = committer.close("t", ROWS.schema)
    assert parts.read_rows(store, manifest, "t").equals(ROWS)
    with pytest.raises(ValueError, match=r"part-00000.* has no column x"):
        parts.read_part(store, manifest.tables["t"].by_shard[0], ["id", "x"])


def test_parts_of_two_schemas_are_not_committed(tmp_path: Path) -> None:
    other = OTHERS["column 'n' int32 instead of int64"]
    committer = parts.Committer(LocalStore(tmp_path), "stages/s/f")
    committer.commit("t", 0, ROWS)
    said = "table t of stages/s/f: its parts differ: column 'n' int32 instead of int64"
    with pytest.raises(ValueError, match=said):
        committer.commit("t", 1, other)
    with pytest.raises(ValueError, match=said):
        committer.close("t", other.schema)
    committer.commit("u", 0, other)
    assert committer.close("u", other.schema).rows == 3


def test_another_format_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("x/manifest.json", make(store, format=99).model_dump_json().encode())
    with pytest.raises(ValueError, match="format 99"):
        m.load_manifest(store, "x/manifest.json")


def test_fingerprints_are_canonical() -> None:
    assert m.fingerprint({"a": 1, "b": [1.5, "ü"]}) == m.fingerprint({"b": [1.5, "ü"], "a": 1})
    assert m.fingerprint({"a": 1}) != m.fingerprint({"a": 2})
    assert len(m.fingerprint(None)) == 16


def test_files_are_hashed_and_stored(store: Store, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.txt").write_text("hello")
    (file,) = m.commit_files(store, tmp_path / "folder", "stages/s/f/files/x")
    assert file.path == "stages/s/f/files/x/x.txt"
    assert file.sha256.startswith("2cf24dba")
    assert store.read(file.path) == b"hello"

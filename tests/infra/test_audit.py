"""Damage of every kind is found, and forgetting it leaves a stage that makes exactly that part anew."""

import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from infra.audit import damages, forget, forget_object
from infra.manifest import DamagedError, File, Manifest, commit_manifest
from infra.parts import commit_part, committed_parts, read_part, table_entry
from infra.store import LocalStore, Store

SCHEMA = pa.schema([("id", pa.string()), ("blob", pa.binary())])


def finished(store: Store) -> Manifest:
    """A stage of three parts and one file."""
    manifest = Manifest(stage="s", module="m", version=1, fingerprint="f" * 16, settings={}, inputs={})
    parts = [
        commit_part(
            store, manifest.folder, "rows", shard, pa.table({"id": [str(shard)] * 9, "blob": [b"x"] * 9}, SCHEMA)
        )
        for shard in range(3)
    ]
    manifest.tables["rows"] = table_entry(SCHEMA, parts)
    store.write(f"{manifest.folder}/files/weights", b"bytes")
    digest = "277089d91c0bdf4f2e6862ba7e4a07605119431f5d13f726dd352b06f1b206a9"
    manifest.files["model"] = [File(path=f"{manifest.folder}/files/weights", bytes=5, sha256=digest)]
    return commit_manifest(store, manifest)


def test_a_whole_stage_has_no_damage(store: Store) -> None:
    assert list(damages(store, finished(store))) == []


def flip(data: bytes) -> bytes:
    return data[:40] + bytes([data[40] ^ 1]) + data[41:]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flip, "other bytes"),
        (lambda data: data[:-1], "bytes instead of"),
        (lambda _: None, "is missing"),
    ],
    ids=["flipped", "truncated", "missing"],
)
def test_damage_is_named_and_forgotten(store: Store, change: Any, said: str) -> None:
    manifest = finished(store)
    part = manifest.tables["rows"].parts[1]
    changed = change(store.read(part.path))
    store.delete(part.path) if changed is None else store.write(part.path, changed)
    (found,) = damages(store, manifest)
    assert said in found.what
    assert found.path == part.path
    with pytest.raises(DamagedError) as raised:
        read_part(store, part)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)  # noqa: S301 (its own)
    forget(store, manifest, [found])
    assert not store.exists(manifest.path)
    assert set(committed_parts(store, manifest.folder, "rows")) == {0, 2}
    # Made anew, the stage is what it was.
    assert list(damages(store, finished(store))) == []


def test_a_part_that_a_reader_found_damaged_is_forgotten(store: Store) -> None:
    manifest = finished(store)
    forget_object(store, manifest.tables["rows"].parts[2].path)
    assert not store.exists(manifest.path)
    assert set(committed_parts(store, manifest.folder, "rows")) == {0, 1}


def test_files_rows_and_schemas_are_checked_too(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    manifest = finished(store)
    store.write(f"{manifest.folder}/files/weights", b"bytez")
    manifest.tables["rows"].parts[0].rows = 8
    manifest.tables["rows"].parts[1:] = []
    found = [damage.what for damage in damages(store, manifest)]
    assert found == ["holds 9 rows instead of 8", "has other bytes than were committed"]
    manifest.tables["rows"].parts[0].rows = 9
    manifest.tables["rows"] = table_entry(pa.schema([("id", pa.int64())]), manifest.tables["rows"].parts)
    assert "another schema" in next(damages(store, manifest)).what

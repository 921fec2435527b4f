"""The store's two promises, atomic and exclusive, on a folder and on S3 over HTTP."""

import hashlib
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.s3 import S3Store
from infra.store import LocalStore, Store, check_path, open_store


def test_what_is_written_is_read(store: Store) -> None:
    store.write("a/b.bin", b"one")
    store.write("a/b.bin", b"two")
    assert store.read("a/b.bin") == b"two"
    assert store.exists("a/b.bin")
    assert not store.exists("a/c.bin")
    assert not store.exists("a")


def test_a_missing_object_is_file_not_found(store: Store) -> None:
    with pytest.raises(FileNotFoundError):
        store.read("nothing")
    with pytest.raises(FileNotFoundError):
        store.digest("nothing")
    store.delete("nothing")


def test_a_digest_holds_a_piece_of_the_object_at_a_time(store: Store) -> None:
    data = hashlib.shake_128(b"weights").digest(8 << 20)
    store.write("weights", data)
    store.digest("weights")  # what libraries load once
    tracemalloc.start()
    try:
        found = store.digest("weights")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == (len(data), hashlib.sha256(data).hexdigest())
    assert peak < len(data) // 2
    store.write("weights", b"")
    assert store.digest("weights") == (0, hashlib.sha256().hexdigest())


def test_create_is_exclusive(store: Store) -> None:
    assert store.create("a/m.json", b"first")
    assert not store.create("a/m.json", b"second")
    assert store.read("a/m.json") == b"first"


def test_of_many_creators_one_wins(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda number: store.create("race", str(number).encode()), range(16)))
    assert sum(won) == 1
    assert store.read("race") == str(won.index(True)).encode()


def test_a_swap_replaces_only_what_was_read(store: Store) -> None:
    assert not store.swap("p/now.json", b"one", b"two")
    assert store.swap("p/now.json", None, b"one")
    assert not store.swap("p/now.json", None, b"other")
    assert store.swap("p/now.json", b"one", b"two")
    assert not store.swap("p/now.json", b"one", b"three")
    assert store.read("p/now.json") == b"two"
    assert list(store.list("p")) == ["p/now.json"]


def test_no_count_is_lost_between_many_swappers(store: Store) -> None:
    store.write("count", b"0")

    def add(_: int) -> None:
        while True:
            old = store.read("count")
            if store.swap("count", old, str(int(old) + 1).encode()):
                return

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(12)))
    assert store.read("count") == b"12"


def test_list_is_recursive_sorted_and_bounded_by_the_folder(store: Store) -> None:
    for path in ("t/b", "t/a/c", "table/x"):
        store.write(path, b"")
    assert list(store.list("t")) == ["t/a/c", "t/b"]
    assert list(store.list("empty")) == []
    store.delete("t/b")
    assert list(store.list("t")) == ["t/a/c"]


def test_a_copy_outlives_its_source(store: Store) -> None:
    store.write("x/one", b"bytes")
    store.copy("x/one", "y/two")
    store.write("x/one", b"changed")
    store.delete("x/one")
    assert store.read("y/two") == b"bytes"


def test_folders_go_up_and_come_back(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights").write_bytes(b"\0" * 100_000)
    (folder / "sub" / "config").write_text("{}")
    store.upload(folder, "files/model")
    back = store.localise("files/model")
    assert (back / "weights").read_bytes() == b"\0" * 100_000
    assert (back / "sub" / "config").read_text() == "{}"
    assert store.localise("files/model") == back


def test_a_folder_comes_without_its_weights_where_they_are_not_needed(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"\0" * 1000)
    (folder / "config.json").write_text("{}")
    store.upload(folder, "files/model")
    light = store.localise("files/model", ".safetensors")
    assert (light / "config.json").read_text() == "{}"
    assert (light / "model.safetensors").exists() == (not store.uri.startswith("s3://"))
    assert (store.localise("files/model") / "model.safetensors").stat().st_size == 1000


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../up", "a/../../b", "a\\b", "a\0b"])
def test_paths_cannot_leave_the_root(path: str, store: Store) -> None:
    with pytest.raises(ValueError, match="leaves the store"):
        store.write(path, b"")
    with pytest.raises(ValueError, match="leaves the store"):
        store.read(path)


def test_check_path_normalises() -> None:
    assert check_path("a//b/./c") == "a/b/c"


def test_open_store_by_uri(tmp_path: Path, s3_bucket: str) -> None:
    assert isinstance(open_store(str(tmp_path)), LocalStore)
    assert isinstance(open_store(f"s3://{s3_bucket}/x"), S3Store)
    with pytest.raises(ValueError, match="root"):
        open_store("ftp://host/x")


def test_a_local_reader_never_sees_a_file_being_written(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("t/done", b"")
    (tmp_path / "t" / ".half.1234").write_bytes(b"ha")
    assert list(store.list("t")) == ["t/done"]


def test_keys_that_lead_out_are_not_fetched(s3_bucket: str, tmp_path: Path) -> None:
    store = S3Store(s3_bucket, "some/prefix", cache=tmp_path / "cache")
    store.client.put_object(Bucket=s3_bucket, Key="some/prefix/model/../../../../../evil/x", Body=b"x")
    with pytest.raises(ValueError, match="leaves the store"):
        store.localise("model")
    assert not list(tmp_path.rglob("evil"))
    with pytest.raises(ValueError, match="leaves the store"):
        store.read("../other/x")
    # Another bucket's address is a path within this one.
    with pytest.raises(FileNotFoundError):
        store.read("s3://other-bucket/x")


def test_a_cache_that_others_can_write_is_not_used(s3_bucket: str, tmp_path: Path) -> None:
    store = S3Store(s3_bucket, "", cache=tmp_path / "cache")
    store.write("model/x", b"x")
    store.cache.mkdir(mode=0o777)
    store.cache.chmod(0o777)
    with pytest.raises(ValueError, match="can be written by others"):
        store.localise("model")
    store.cache.chmod(0o700)
    assert (store.localise("model") / "x").read_bytes() == b"x"

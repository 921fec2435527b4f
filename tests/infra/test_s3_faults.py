"""The store and its commits on S3, through every fault of servers and networks."""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow as pa
import pytest
from faulty import FAULTS, FaultyProxy, faulty

from infra import files, parts
from infra import manifest as m
from infra.audit import damages
from infra.s3 import S3Store

ROWS = pa.table({"id": [str(number) for number in range(3000)]})


@pytest.fixture(scope="module")
def proxy(s3_server: str) -> Iterator[FaultyProxy]:
    with faulty(s3_server) as running:
        yield running


# Faults that only a client's patience ends.
SILENT = {"timeout", "lost answer, silence", "stalled body"}


@pytest.fixture
def store(
    proxy: FaultyProxy,
    s3_bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> S3Store:
    """A store behind the proxy that repeats at once; its patience is short only where silence is the fault."""
    from botocore.retries.standard import ExponentialBackoff

    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.01)
    fault = getattr(request.node, "callspec", None) and request.node.callspec.params.get("fault")
    return S3Store(s3_bucket, "some/prefix", cache=tmp_path / "cache", silence=0.4 if fault in SILENT else 60)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_operation_outlives_the_fault(fault: str, proxy: FaultyProxy, store: S3Store, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_bytes(b"\1" * 200_000)
    with proxy.failing(fault) as failed:
        store.write("a/one", b"1" * 5000)
        assert store.read("a/one") == b"1" * 5000
        assert store.create("a/two", b"first")
        assert store.digest("a/two") == (5, hashlib.sha256(b"first").hexdigest())
        assert not store.create("a/two", b"second")
        assert store.read("a/two") == b"first"
        assert store.exists("a/one")
        assert not store.exists("a/three")
        with pytest.raises(FileNotFoundError):
            store.read("a/three")
        store.copy("a/one", "a/three")
        assert list(store.list("a")) == ["a/one", "a/three", "a/two"]
        store.delete("a/one")
        assert not store.exists("a/one")
        store.upload(folder, "files/model")
        assert (store.localise("files/model") / "weights").read_bytes() == b"\1" * 200_000
        with files.open_file(f"{store.uri}/a/three") as stream:
            stream.seek(10)
            assert stream.read() == b"1" * 4990
    assert {request.split()[0] for request in failed} == {"GET", "PUT", "HEAD", "DELETE"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_stage_is_committed_once_through_the_fault(fault: str, proxy: FaultyProxy, store: S3Store) -> None:
    manifest = m.Manifest(stage="s", module="m", version=1, fingerprint="f", settings={}, inputs={})
    with proxy.failing(fault):
        made = [parts.commit_part(store, manifest.folder, "t", shard, ROWS) for shard in range(2)]
        assert parts.committed_parts(store, manifest.folder, "t") == dict(enumerate(made))
        manifest.tables["t"] = parts.table_entry(ROWS.schema, made)
        committed = m.commit_manifest(store, manifest)
        # The commit whose answer was lost is this run's own; a later one adopts it.
        assert committed is manifest
        later = manifest.model_copy(update={"facts": {"later": True}})
        assert m.commit_manifest(store, later) == manifest
        assert parts.read_rows(store, committed, "t").num_rows == 6000
        assert list(damages(store, committed)) == []
    objects = list(store.list("stages/s/f"))
    assert len(objects) == 5, objects


def test_a_server_that_never_recovers_is_an_error_in_the_end(proxy: FaultyProxy, store: S3Store) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    store.write("x", b"x" * 1000)
    for fault in ("SlowDown", "reset", "cut body"):
        with proxy.failing(fault, always=True), pytest.raises((BotoCoreError, ClientError)):
            store.read("x")
    assert store.read("x") == b"x" * 1000


def test_large_files_go_up_and_come_back_in_parts_through_faults(
    proxy: FaultyProxy, store: S3Store, tmp_path: Path
) -> None:
    """Above 8 MiB boto3 sends and fetches parts, each of which may fail."""
    folder = tmp_path / "large"
    folder.mkdir()
    data = hashlib.shake_128(b"weights").digest(20 << 20)
    (folder / "weights").write_bytes(data)
    with proxy.failing("reset") as failed:
        store.upload(folder, "files/large")
        assert (store.localise("files/large") / "weights").read_bytes() == data
    assert sum("partNumber=" in request for request in failed) == 3
    assert io.BytesIO(store.read("files/large/weights")).getvalue() == data
    assert not boto3.client("s3").list_multipart_uploads(Bucket=store.bucket).get("Uploads")

"""What tests share: stores, an S3 server over HTTP, a small disk."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from infra.cluster import free_port, token_environment
from infra.s3 import S3Store
from infra.store import LocalStore, Store

# Ray reads it where it is first imported, and that may be a test without a cluster.
os.environ.update(token_environment())


@pytest.fixture(autouse=True, scope="session")
def stays() -> Iterator[None]:
    """A stage's entry point ends its process; here that would be all tests, as if they had passed."""

    def leave() -> NoReturn:
        raise AssertionError("the entry point of a stage was called in the tests' own process")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.stage.leave", leave)
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of moto's S3 server, a process of its own. It honours conditional puts, which stores rest on."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    urllib.request.urlopen(f"{url}/moto-api/", timeout=1).close()
                    break
                except (urllib.error.URLError, OSError):
                    assert server.poll() is None, "the S3 server ended while starting"
                    assert time.monotonic() < deadline, "the S3 server did not answer"
                    time.sleep(0.2)
            yield url
        finally:
            server.terminate()


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket; the environment names the server and credentials."""
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"bucket-{time.time_ns()}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return bucket


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Each kind of store in turn."""
    if request.param == "local":
        return LocalStore(tmp_path / "store")
    return S3Store(request.getfixturevalue("s3_bucket"), "some/prefix", cache=tmp_path / "cache")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root")
    yield place
    subprocess.run(["umount", str(place)], check=True)

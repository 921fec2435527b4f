"""What is lacking, asked of real servers and of this machine."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from machine import ROOT, Up

from flows.doctor import compiler, conditional, examine, gpus, prefect_server, ray_cluster, same, shared_memory
from infra.cluster import free_port
from infra.s3 import S3Store
from infra.store import open_store
from tasks.config import RunConfig


@pytest.fixture
def config(models: Path) -> Callable[..., RunConfig]:
    def make(**resources: Any) -> RunConfig:
        data = tiny.settings(models)
        return RunConfig.model_validate({**data, "device": "gpu", "resources": resources})

    return make


def test_a_machine_with_everything_lacks_nothing(models: Path, tmp_path: Path) -> None:
    checks, notes = examine(RunConfig.model_validate(tiny.settings(models)), str(tmp_path / "root"))
    assert ({name: lines for name, lines in checks.items() if lines}, notes) == ({}, [])
    assert {"compiler", "shared memory", "store keeps what stands", "disk, memory and cores"} <= checks.keys()


def test_what_is_lacking_is_a_table_and_exit_code_2(models: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flows.cli", "doctor", str(models / "tiny.yaml"), "--json"]
    command += ["--root", str(tmp_path / "root"), "--set", "models.teacher.id=/nowhere"]
    bare = {**os.environ, "PATH": str(tmp_path), "SWITCHYARD_HOME": str(tmp_path), "COLUMNS": "200"}
    bare.pop("PREFECT_API_URL", None)
    done = subprocess.run(command, env=bare, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert not said["checks"]["compiler"]
    assert any(line.endswith("apt-get install g++") for line in said["problems"])
    assert any(line.startswith("models.teacher: ") for line in said["problems"])
    assert "Traceback" not in done.stderr
    assert "✗" in done.stderr
    assert not list((tmp_path / "root").rglob("*.json"))


def test_tools_and_devices(config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, small_disk: Path) -> None:
    assert shared_memory(small_disk)[0].startswith(f"{small_disk}: it has 0.01 GiB")
    assert compiler() == []
    (line,) = gpus(config(), 0)
    assert line == "device: gpu, and this machine has no GPU: set device: cpu, or resources.ray_address"
    # Teacher and TA are one model with one engine; the student has its own.
    lines = gpus(config(train_workers=2, gpus_per_worker=1), 3)
    assert lines[0].startswith("resources: engines take 2 GPUs, training 2, this machine has 3: set resources.release")
    enough = gpus(config(train_workers=2, gpus_per_worker=1, release_engines=True), 3)
    # The build of torch that tests run with.
    assert [line.partition(":")[0] for line in enough] == ["torch"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert compiler()


def test_a_store_that_replaces_what_stands_is_found(s3_bucket: str, tmp_path: Path) -> None:
    conditional(str(tmp_path / "root"))
    root = f"s3://{s3_bucket}/some/prefix"
    conditional(root)
    store = open_store(root)
    assert isinstance(store, S3Store)

    def unconditional(request: Any, **_: Any) -> None:
        """What a server does that does not know the headers."""
        for header in ("If-None-Match", "If-Match"):
            del request.headers[header]

    store.client.meta.events.register("before-sign.s3.PutObject", unconditional)
    try:
        with pytest.raises(ValueError, match="ignores If-None-Match"):
            conditional(root)
    finally:
        store.client.meta.events.unregister("before-sign.s3.PutObject", unconditional)
    assert list(store.list("probe")) == []


def test_servers_are_told_apart(up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_API_AUTH_STRING", "PREFECT_API_KEY", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    prefect, ray = up.facts["prefect_url"], up.facts["ray_address"]
    assert prefect_server(None) == []
    assert prefect_server(prefect) == []
    # The same server under a name that does not say loopback: it lets anybody in.
    (line,) = prefect_server(prefect.replace("127.0.0.1", "127.1"))
    assert "answers whoever asks: let it demand PREFECT_API_AUTH_STRING" in line
    (line,) = prefect_server(prefect.replace("/api", "/nothing"))
    assert line.endswith("/nothing has no /admin/version (200): correct the address")
    (line,) = ray_cluster(ray)
    assert line.endswith("refuses requests without RAY_AUTH_TOKEN: export RAY_AUTH_TOKEN as it has it")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    (line,) = ray_cluster(ray)
    assert "refuses this RAY_AUTH_TOKEN" in line
    monkeypatch.setenv("RAY_AUTH_TOKEN", up.facts["ray_environment"]["RAY_AUTH_TOKEN"])
    assert ray_cluster(ray) == []
    assert ray_cluster(ray.replace("127.0.0.1", "127.1")) == []
    (line,) = ray_cluster(f"http://127.0.0.1:{free_port()}")
    assert "does not answer (ConnectError): start it" in line
    assert same("here", "Ray", "2.59.1", "2.60.0", parts=3)
    assert same("here", "Prefect", "3.7.1", "3.7.7", parts=2) == []

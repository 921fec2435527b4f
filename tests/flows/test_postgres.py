"""Prefect's server on Postgres: a throwaway cluster, the server on it, all deployments, and a flow by a worker."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from machine import ROOT

from flows.server import answers, environment, server_command, server_environment
from infra.cluster import free_port
from infra.process import Guarded

SECONDS = 500
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
PREFECT = [sys.executable, "-m", "prefect"]


def binaries() -> Path | None:
    """Where Postgres' programs lie: on the path, or where Debian puts those of the newest version."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    versions = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max((path.parent for path in versions), key=lambda path: int(path.parent.name), default=None)


@pytest.fixture
def postgres() -> Iterator[str]:
    """Address of a database on loopback, behind a password; cluster and files are gone afterwards."""
    programs = binaries()
    if programs is None:
        pytest.skip("needs Postgres (Debian: apt-get install postgresql)")
    # Postgres refuses root, and root's folders refuse everybody else.
    user: dict[str, Any] = {"user": "nobody"} if os.geteuid() == 0 else {}
    folder, port = Path(tempfile.mkdtemp(prefix="switchyard-postgres-", dir="/tmp")), free_port()
    password = secrets.token_urlsafe(16)
    try:
        (folder / "password").write_text(password)
        if user:
            shutil.chown(folder, "nobody")
            shutil.chown(folder / "password", "nobody")
        made = [programs / "initdb", "-D", folder / "data", "-U", "switchyard", "--auth=scram-sha-256"]
        made += ["--encoding=UTF8", "--no-sync", "--pwfile", folder / "password"]
        subprocess.run(made, check=True, capture_output=True, cwd="/", **user)
        address = ["-h", "127.0.0.1", "-p", str(port), "-k", ""]
        with subprocess.Popen(
            [programs / "postgres", "-D", folder / "data", "-c", "fsync=off", *address], cwd="/", **user
        ) as server:
            try:
                known = {**os.environ, "PGPASSWORD": password}
                login = ["-h", "127.0.0.1", "-p", str(port), "-U", "switchyard"]
                deadline = time.monotonic() + 60
                while subprocess.run(
                    [programs / "createdb", *login, "prefect"], env=known, capture_output=True
                ).returncode:
                    assert server.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.5)
                yield f"postgresql+asyncpg://switchyard:{password}@127.0.0.1:{port}/prefect"
            finally:
                server.terminate()
    finally:
        shutil.rmtree(folder)


@pytest.mark.long
@pytest.mark.timeout(SECONDS)
def test_a_flow_runs_on_a_server_with_postgres(postgres: str, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    known = {**server_environment(tmp_path, url), "PREFECT_API_DATABASE_CONNECTION_URL": postgres}
    worker: Guarded | None = None
    server = Guarded(server_command(port), tmp_path / "server.log", known)
    client = {**os.environ, **environment(tmp_path, url), "PWD": str(ROOT)}

    def prefect(*arguments: str) -> None:
        done = subprocess.run([*PREFECT, *arguments], env=client, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    try:
        while not answers(url):
            assert server.alive, server.tail(30)
            time.sleep(0.3)
        # As docs/operate.md has it.
        template = ("--base-job-template", "infra/kubernetes/prefect/pool.json")
        prefect("work-pool", "create", "switchyard", "--type", "process")
        prefect("work-pool", "create", "switchyard-docker", "--type", "docker")
        prefect("work-pool", "create", "switchyard-kubernetes", "--type", "kubernetes", *template)
        prefect("--no-prompt", "deploy", "--all")
        prefect("deployment", "run", "reap/reap")
        command = [*PREFECT, "worker", "start", "--pool", "switchyard", "--type", "process"]
        worker = Guarded(command, tmp_path / "worker.log", client)
        api = httpx.Client(base_url=url, timeout=60)
        assert api.post("/deployments/count", json={}).json() == len(DEPLOYMENTS)
        pool = api.get("/work_pools/switchyard-kubernetes").json()["base_job_template"]
        assert pool == json.loads((ROOT / template[1]).read_text())
        assert api.get("/v2/concurrency_limits/switchyard-gpus").json()["limit"] == 8
        wanted = {"flows": {"name": {"any_": ["reap"]}}, "flow_runs": {"state": {"type": {"not_any_": ["SCHEDULED"]}}}}
        deadline = time.monotonic() + 200
        while not (runs := api.post("/flow_runs/filter", json=wanted).json()) or runs[0]["state"]["type"] not in FINAL:
            assert time.monotonic() < deadline, worker.tail(30)
            time.sleep(0.5)
        assert [run["state"]["type"] for run in runs] == ["COMPLETED"]
    finally:
        if worker:
            worker.stop()
        server.stop()
    # It was Postgres that kept it.
    assert not list(tmp_path.glob("*.db"))

"""Nothing runs on a Prefect server that lets strangers start runs; asked of real servers on this machine."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import yaml
from machine import ROOT

from flows.doctor import open_prefect
from flows.server import START_SECONDS, answers, environment, server_command, server_environment
from infra.cluster import free_port
from infra.process import Guarded

FLOW = """
import sys, yaml
from flows.distill import distill
from flows.evaluate import evaluate
flow = {"distill": distill, "evaluate": evaluate}[sys.argv[1]]
print(flow(yaml.safe_load(open(sys.argv[2])), sys.argv[3], return_state=True).message)
"""


@contextmanager
def prefect(home: Path, **more: str) -> Iterator[str]:
    """Address of a Prefect server, spelt so that it does not say loopback."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    server = Guarded(server_command(port), home / "server.log", {**server_environment(home, url), **more})
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(url):
            assert server.alive, server.tail()
            assert time.monotonic() < deadline, server.tail()
            time.sleep(0.2)
        yield url.replace("127.0.0.1", "127.1")
    finally:
        server.stop()


def fails(home: Path, url: str, *command: str) -> subprocess.CompletedProcess[str]:
    known = {**os.environ, **environment(home, url), "SWITCHYARD_HOME": str(home), "COLUMNS": "300"}
    return subprocess.run([sys.executable, *command], env=known, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.timeout(900)
def test_an_open_server_beyond_loopback_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, root = tiny.write_config(tmp_path), str(tmp_path / "root")
    (tmp_path / "evaluation.yaml").write_text(yaml.safe_dump({"model": {"id": "/nowhere"}}))
    monkeypatch.delenv("PREFECT_API_AUTH_STRING", raising=False)
    with prefect(tmp_path / "open") as url:
        line = f"PREFECT_API_URL: {url} answers whoever asks: let it demand PREFECT_API_AUTH_STRING, or unset "
        line += "PREFECT_API_URL"
        assert open_prefect(url) == [line]
        # The same server is not open where only this machine reaches it.
        assert open_prefect(url.replace("127.1", "127.0.0.1")) == []
        for command in (["run", str(config), "--root", root], ["up"]):
            refused = fails(tmp_path / "home", url, "-m", "flows.cli", *command)
            assert (refused.returncode, refused.stderr.splitlines()[-1]) == (2, f"error: {line}"), refused.stderr
        for flow, settings in (("distill", config), ("evaluate", tmp_path / "evaluation.yaml")):
            ended = fails(tmp_path / "home", url, "-c", FLOW, flow, str(settings), root)
            assert ended.stdout.splitlines()[-1:] == [line], ended.stderr
    assert not (tmp_path / "root").exists()
    assert not (tmp_path / "home/up.json").exists()


@pytest.mark.timeout(400)
def test_a_server_with_a_password_is_none_of_them(tmp_path: Path) -> None:
    with prefect(tmp_path, PREFECT_SERVER_API_AUTH_STRING="you:a-password") as url:
        assert open_prefect(url) == []
    assert open_prefect(None) == []
    # One that is not there is found out when it is used.
    assert open_prefect(url) == []

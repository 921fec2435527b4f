"""A run that a disk keeps from starting says so in one line; a run's own Prefect server that dies is started again."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.server import EmbeddedServer, answers

ROOT = Path(__file__).parent.parent.parent


def test_a_run_on_a_read_only_disk_is_one_line(small_disk: Path) -> None:
    (small_disk / "root").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    command = [sys.executable, "-m", "flows.cli", "run", "configs/quickstart.yaml", "--root", str(small_disk / "root")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: --root: ")
    assert line.endswith("cannot be written (Read-only file system): choose another folder")


@pytest.mark.long
def test_a_server_that_is_killed_is_started_again_at_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    server = EmbeddedServer(tmp_path)
    server.start()
    try:
        server.wait()
        (guard,) = (child for child in psutil.Process().children() if "server" in child.cmdline())
        killed = guard.children()
        for process in killed:
            process.kill()
        psutil.wait_procs(killed, timeout=10)
        assert not answers(server.url)
        deadline = time.monotonic() + 60
        while not answers(server.url):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        server.stop()
    assert not answers(server.url)


@pytest.mark.long
def test_a_server_that_is_killed_in_its_start_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    server = EmbeddedServer(tmp_path)
    server.start()
    try:
        (guard,) = (child for child in psutil.Process().children() if "server" in child.cmdline())
        while not (starting := guard.children()):
            time.sleep(0.05)
        starting[0].kill()
        server.wait()
    finally:
        server.stop()


@pytest.mark.long
def test_a_server_that_never_comes_up_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".prefect").mkdir()
    (tmp_path / ".prefect" / "prefect.db").write_text("this is no database")
    command = [sys.executable, "-m", "flows.cli", "run", "configs/quickstart.yaml", "--root", str(tmp_path)]
    environment = {**os.environ, "SWITCHYARD_HOME": str(tmp_path / "home")}
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "error: Prefect's server ended in 3 starts" in ended.stderr

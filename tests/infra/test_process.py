"""Guarded children: nothing that a run starts outlives it, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from infra.process import TOKEN, Guarded, detached, end, marked, undisturbed

# A child that starts a grandchild in a session of its own, as Ray does, and writes both ids.
FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def wait_for(condition: object, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def printed_pid(log: Path) -> int:
    wait_for(lambda: log.exists() and log.read_text().strip())
    return int(log.read_text().split()[0])


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_stop_ends_the_whole_family(tmp_path: Path) -> None:
    guarded = Guarded([sys.executable, "-c", FAMILY], tmp_path / "log")
    grandchild = printed_pid(tmp_path / "log")
    assert guarded.alive
    guarded.stop()
    assert gone(grandchild)
    assert not list(marked(guarded.token))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "kill"])
def test_a_killed_parent_takes_the_family_with_it(tmp_path: Path, number: int) -> None:
    script = f"""
import time
from pathlib import Path
from infra.process import Guarded
guarded = Guarded([{sys.executable!r}, "-c", {FAMILY!r}], Path({str(tmp_path / "log")!r}))
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", script])
    grandchild = printed_pid(tmp_path / "log")
    os.kill(parent.pid, number)
    parent.wait()
    wait_for(lambda: gone(grandchild))


def test_a_child_that_ends_by_itself_leaves_nothing(tmp_path: Path) -> None:
    script = FAMILY.rsplit("time.sleep(600)", 1)[0]
    guarded = Guarded([sys.executable, "-c", script], tmp_path / "log")
    grandchild = printed_pid(tmp_path / "log")
    wait_for(lambda: not guarded.alive)
    assert gone(grandchild)
    assert guarded.tail() == str(grandchild)


def test_a_detached_child_ends_by_its_token(tmp_path: Path) -> None:
    pid = detached([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "log", {}, "some-token")
    wait_for(lambda: [process.pid for process in marked("some-token")] == [pid])
    assert psutil.Process(pid).environ()[TOKEN] == "some-token"
    end("some-token")
    wait_for(lambda: gone(pid))


def test_signals_do_nothing_while_a_run_is_closed() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with undisturbed():
            os.kill(os.getpid(), signal.SIGTERM)
        assert heard == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)

"""A run that a disk keeps from starting says so in one line."""

import subprocess
import sys
from pathlib import Path

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

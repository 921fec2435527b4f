"""Whole runs from a shell: how to start one, wait for what it does, kill it, and look at what it left."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from witness import Witness

ROOT = Path(__file__).parent.parent.parent
SECONDS = 1800
COMMAND = [sys.executable, "-m", "flows.cli"]


def start(
    config: Path, root: Path | str, *options: str, said: Path | None = None, **variables: str
) -> subprocess.Popen[str]:
    """``said``: where to put what it tells a person; absent: to this process's stderr."""
    command = [*COMMAND, "run", str(config), "--root", str(root), "--json", *options]
    environment = {**os.environ, **variables, "SWITCHYARD_HOME": str(config.parent / "home")}
    # Where these tests run in the background, Ctrl-C is ignored, and children would inherit that.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with said.open("w") if said else nullcontext() as stderr:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": stderr}
        return subprocess.Popen(command, cwd=ROOT, text=True, env=environment, preexec_fn=heed, **pipes)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, _ = process.communicate(timeout=SECONDS)
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert process.returncode == 0, result
    return result


def wait_for_stage(root: Path, stage: str, pattern: str, count: int = 1) -> None:
    """Return when so many files of the stage's outputs are there."""
    deadline = time.monotonic() + SECONDS
    while len(list(root.glob(f"stages/{stage}/*/{pattern}"))) < count:
        assert time.monotonic() < deadline, f"{stage} did not start"
        time.sleep(0.1)


def processes_of(root: Path) -> list[str]:
    """Command lines of everything that still works for a run on this root."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(root) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def ids(root: Path, stage: str, table: str, column: str, fingerprint: str = "*") -> list[str]:
    import duckdb

    paths = f"{root}/stages/{stage}/{fingerprint}/{table}/*.parquet"
    return [row[0] for row in duckdb.sql(f"SELECT {column} FROM '{paths}' ORDER BY 1").fetchall()]  # noqa: S608


def fingerprints(result: dict[str, Any]) -> dict[str, str]:
    return {stage["name"]: stage["fingerprint"] for stage in result["stages"]}


def kill(process: subprocess.Popen[str], root: Path) -> None:
    """``kill -9`` of the flow; returns when nothing of the run is left."""
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while processes_of(root):
        assert time.monotonic() < deadline, processes_of(root)
        time.sleep(0.2)


class Finished:
    def __init__(self, config: Path, root: Path, result: dict[str, Any], witness: Witness, said: str) -> None:
        self.config, self.root, self.result, self.witness, self.said = config, root, result, witness, said

"""A whole run of which one process after another gets ``kill -9`` ends with the rows of one that was left alone."""

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from kills import strike, wait_for
from whole import (
    COMMAND,
    ROOT,
    SECONDS,
    Finished,
    fingerprints,
    finish,
    ids,
    kill,
    processes_of,
    start,
    wait_for_stage,
)


@pytest.mark.timeout(3 * SECONDS)
def test_a_redo_whose_processes_are_killed_continues_to_the_same_rows(finished: Finished, tmp_path: Path) -> None:
    root = shutil.copytree(finished.root, tmp_path / "root")
    # Training will meet a part that is not as it was committed: keep makes it anew, and the run goes on.
    # It is damaged before the redo, for a training that continues from its last step reads no rows.
    (part,) = root.glob("stages/keep/*/kept/part-00000-*.parquet")
    part.write_bytes(part.read_bytes()[:-1] + b"?")

    # Ctrl-C, in a training that goes on although a worker was killed.
    run = start(finished.config, root, "--from", "train")
    gone = strike(run.pid, "training worker")
    wait_for(run.pid, "training worker", besides=gone)
    wait_for_stage(root, "train", "checkpoints/checkpoint*")
    run.send_signal(signal.SIGINT)
    run.wait(timeout=120)
    assert run.returncode == 130
    assert processes_of(root) == []

    # The flow, when its Prefect server, a job and the engine room have been killed and replaced.
    run = start(finished.config, root)
    strike(run.pid, "Prefect's server")
    wait_for_stage(root, "evaluate-after", "spec.json", 2)
    gone = strike(run.pid, "job", "tasks.evaluate")
    wait_for(run.pid, "job", "tasks.evaluate", besides=gone)
    gone = strike(run.pid, "engine room")
    wait_for(run.pid, "engine room", besides=gone)
    kill(run, root)

    # Ray's head: the run ends, in one line.
    said = tmp_path / "said.txt"
    run = start(finished.config, root, said=said)
    wait_for(run.pid, "job", "tasks.evaluate")
    strike(run.pid, "Ray head")
    assert run.wait(timeout=300) == 1
    assert "Traceback" not in said.read_text()
    assert said.read_text().splitlines()[-1].endswith("the same command continues")
    assert processes_of(root) == []

    result = finish(start(finished.config, root))
    again = {stage["name"] for stage in result["stages"] if not stage["reused"]}
    assert again == {"evaluate-after", "report"}
    verified = subprocess.run([*COMMAND, "verify", "tiny", "--root", str(root)], cwd=ROOT)
    assert verified.returncode == 0
    before, after = fingerprints(finished.result), fingerprints(result)
    assert {name for name in before if before[name] != after[name]} == {"train", "evaluate-after", "report"}
    for stage, table, column in (("train", "steps", "step"), ("evaluate-after", "evaluations", "prompt_id")):
        assert ids(root, stage, table, column, after[stage]) == ids(root, stage, table, column, before[stage])


@pytest.mark.long
@pytest.mark.timeout(3 * SECONDS)
def test_a_run_killed_in_every_stage_continues_to_the_same_rows(finished: Finished, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for stage in fingerprints(finished.result):
        killed = start(finished.config, root)
        wait_for_stage(root, stage, "spec.json")
        time.sleep(1)
        kill(killed, root)
    result = finish(start(finished.config, root))
    made = fingerprints(finished.result)
    assert fingerprints(result) == made
    for name, table, column in (
        ("warmup-annotate", "samples", "sample_id"),
        ("student-sample", "samples", "sample_id"),
        ("annotate", "samples", "prompt_id"),
        ("keep", "scores", "prompt_id"),
        ("train", "steps", "step"),
        ("evaluate-after", "evaluations", "prompt_id"),
    ):
        # Another test may have redone stages beside the first ones.
        assert ids(root, name, table, column) == ids(finished.root, name, table, column, made[name]), name

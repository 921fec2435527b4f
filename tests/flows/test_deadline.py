"""A stage past its deadline is stopped, and submitted again where that is set."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from whole import COMMAND, ROOT, SECONDS, processes_of


@pytest.mark.long
@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize(("again", "attempts"), [(False, 1), (True, 2)])
def test_a_late_stage_fails_or_is_tried_again(tmp_path: Path, again: bool, attempts: int) -> None:
    tiny.save_model(tmp_path / "teacher", seed=1)
    # No process imports torch in a second.
    resources = {"stage_deadline_minutes": 1 / 60, "retry_late_stages": again, "stage_retries": 1}
    config = tmp_path / "late.yaml"
    config.write_text(yaml.safe_dump({**tiny.settings(tmp_path), "resources": resources}))
    root = tmp_path / "root"
    done = subprocess.run(
        [*COMMAND, "run", str(config), "--root", str(root), "--json"], capture_output=True, text=True, cwd=ROOT
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 1
    assert result["state"] == "Failed"
    assert result["message"].startswith("models: ")
    assert result["message"].endswith("past resources.stage_deadline_minutes 0.0166667")
    (record,) = (json.loads(path.read_text()) for path in root.glob("runs/*/run.json"))
    assert [stage["attempts"] for stage in record["stages"]] == [attempts]
    assert not processes_of(root)


@pytest.mark.long
@pytest.mark.timeout(SECONDS)
def test_a_late_stage_that_is_tried_again_ends_well(tmp_path: Path) -> None:
    here = Path(__file__).parent
    # The stage's job finds its module there.
    known = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(here)])}
    command = [sys.executable, str(here / "late.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=known)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"name": "late", "state": "Completed", "message": "after 2 attempts", "attempts": 2}

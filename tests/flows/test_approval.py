"""Approval before spending: what needs it, and a real Prefect server where a person gives it or does not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from flows.approval import above, agreed
from flows.record import RunRecord
from tasks.config.budget import Budget

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"queries": 500}, ""),
        ({"queries": 500, "approve_above": {"queries": 500}}, ""),
        ({"queries": 501, "approve_above": {"queries": 500}}, "501 queries"),
        (
            {"queries": 501, "tokens": 7000, "approve_above": {"queries": 9, "tokens": 6999}},
            "501 queries and 7,000 tokens",
        ),
        ({"queries": 5, "approve_above": {"tokens": 100}}, "tokens without a cap"),
        ({"queries": 5, "money": 12.5, "price": {"input": 1, "output": 1}, "approve_above": {"money": 12}}, "12.5 USD"),
    ],
)
def test_what_needs_approval(budget: dict[str, Any], said: str) -> None:
    assert above(Budget.model_validate(budget)) == said


@pytest.mark.parametrize(("approved", "factor", "agrees"), [(True, 2.0, True), (True, 2.5, False), (False, 2.0, False)])
def test_an_agreement_covers_no_more_than_was_asked(approved: bool, factor: float, agrees: bool) -> None:
    settings = {"budget": {"queries": 5, "spending_factor": 2.0}}
    known = RunRecord(run="r", name="n", root="x", config=settings, approved=approved)
    assert agreed(known, Budget(queries=5, spending_factor=factor)) is agrees
    assert not agreed(None, Budget(queries=5))


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_run_waits_in_prefect_for_a_person(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).parent / "approvals.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=390)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["came of it"] == {
        "approved": "spent",
        "declined": "budget.approve_above: 500 queries were declined in Prefect: lower the budget",
        "cancelled": "cancelled from Prefect while it waited for approval",
        "in vain": "budget.approve_above: nobody approved 500 queries within 0.000833333 hours: run it again",
    }
    assert all("would spend 500 queries on the teacher, and 2 times" in told for told in found["told"].values())


@pytest.mark.timeout(400)
def test_a_shell_without_a_terminal_takes_a_flag(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "teacher", seed=1)
    data = tiny.settings(tmp_path)
    data["budget"]["approve_above"] = {"queries": 10}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
    command = [sys.executable, "-m", "flows.cli", "run", str(tmp_path / "tiny.yaml"), "--root", str(tmp_path / "root")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=390)
    assert done.returncode == 2
    said = "error: budget.approve_above: 24 queries need approval, and there is no terminal: pass --yes"
    assert done.stderr.splitlines()[-1] == said

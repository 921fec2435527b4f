"""Promotion and the verdict: what the intervals decide, and that the promoted student moves once and whole."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from synthetic_run import SyntheticRun

from infra.store import LocalStore, Store
from tasks.config.evaluate import PromoteConfig
from tasks.metrics import DIFFERENCES, LABELS, METRICS, Habits, Results
from tasks.promote import Rival, decide
from tasks.promoted import current, history, names, promote, roll_back
from tasks.verdict import headline, outcome, verdict


def results(**changes: tuple[float, float, float]) -> Results:
    """Final − base as (mean, low, high) by metric; everything else unknown."""
    unknown = {key: None for metric in METRICS for key in (metric, f"{metric}_ci")}
    change = dict(unknown)
    for metric, (mean, low, high) in changes.items():
        change |= {metric: mean, f"{metric}_ci": [low, high]}
    differences = {name: dict(unknown) for name in DIFFERENCES} | {"final-base": change}
    return Results({label: dict(unknown) for label in LABELS}, differences, problems=10)


BETTER = results(loss=(-0.4, -0.5, -0.3), accuracy=(0.1, -0.01, 0.2))
WORSE = results(loss=(0.4, 0.3, 0.5))


@pytest.mark.parametrize(
    ("metric", "bounds", "expected"),
    [
        ("loss", [-0.2, -0.1], "better"),
        ("loss", [0.1, 0.2], "worse"),
        ("loss", [-0.1, 0.1], "unclear"),
        ("loss", [-0.1, 0.0], "unclear"),
        ("accuracy", [0.1, 0.2], "better"),
        ("accuracy", [-0.2, -0.1], "worse"),
        ("rouge_l", [0.0, 1.0], "unclear"),
        ("rouge_l", None, "unknown"),
    ],
)
def test_outcome(metric, bounds, expected):
    assert outcome(metric, bounds) == expected


def test_verdict():
    assert verdict(BETTER, 0.95) == (
        "The student learned: response loss fell by 0.400 nats per token (95 % interval 0.300 to 0.500); "
        "no difference outside the interval in accuracy."
    )
    assert headline(WORSE) == "The student got worse"
    assert headline(results()) == "Whether the student learned is not known"
    assert headline(results(loss=(0, -1, 1))) == "The student did not measurably change"
    mixed = results(loss=(-0.4, -0.5, -0.3), rouge_l=(-3, -4, -2))
    assert verdict(mixed, 0.9).startswith("The student changed for better and worse: response loss fell")
    assert "ROUGE-L fell by 3.0 points (90 % interval 2.0 to 4.0)" in verdict(mixed, 0.9)


@pytest.mark.parametrize(
    ("found", "settings", "has_student", "promoted", "reason"),
    [
        (BETTER, PromoteConfig(), True, True, "−0.400 nats per token, interval −0.500 to −0.300: better"),
        (BETTER, PromoteConfig(metric="accuracy"), True, False, "holds 0"),
        (BETTER, PromoteConfig(metric="rouge_l"), True, False, "not known"),
        (BETTER, PromoteConfig(enabled=False), True, False, "switched off"),
        (BETTER, PromoteConfig(), False, False, "no student"),
        (WORSE, PromoteConfig(), True, False, "worse than the base"),
    ],
)
def test_decision(found, settings, has_student, promoted, reason):
    decision = decide(found, settings, has_student, None)
    assert decision.promoted is promoted
    assert reason in decision.reason


GATE = PromoteConfig(metric="accuracy", task_problems=5)
RIVAL = Rival(label="promoted", fingerprint="f" * 16)


def rivals(accuracy=(0.1, 0.05, 0.15), tokens=20.0, eos_rate=0.99, tasks=()) -> Results:
    """Final against a promoted student that writes 20 tokens and ends 99 % of its responses. ``tasks``: problems and
    interval of single tasks."""
    found = results(accuracy=(-0.5, -0.6, -0.4))
    found.differences["final-promoted"] = results(accuracy=accuracy).differences["final-base"]
    found.habits = {"final": Habits(tokens, eos_rate), "promoted": Habits(20.0, 0.99)}
    for number, (problems, low, high) in enumerate(tasks):
        part = results()
        part.differences["final-promoted"] = results(accuracy=(0.0, low, high)).differences["final-base"]
        part.problems = problems
        found.by_source[f"task-{number}"] = part
    return found


@pytest.mark.parametrize(
    ("found", "promoted", "reason"),
    [
        (rivals(), True, "better than the promoted student outside the interval"),
        (rivals(accuracy=(0.1, -0.01, 0.2)), False, "the interval holds 0"),
        (rivals(tokens=31), False, "1.55 times as long (limits 0.5 to 1.5)"),
        (rivals(tokens=9), False, "0.45 times as long"),
        (rivals(tokens=30, eos_rate=0.97), True, "better"),
        (rivals(eos_rate=0.9), False, "90.0 % of responses end by themselves, 99.0 % before (limit 2 points less)"),
        (rivals(tasks=[(5, -0.2, -0.1), (5, 0.0, 0.1)]), False, "1 of 2 tasks got worse (task-0) (limit 0)"),
        (rivals(tasks=[(4, -0.2, -0.1)]), True, "better"),
        (rivals(tasks=[(5, -0.2, 0.0)]), True, "better"),
    ],
)
def test_a_new_student_must_beat_the_promoted_one_within_limits(found, promoted, reason):
    decision = decide(found, GATE, True, RIVAL)
    assert decision.promoted is promoted
    assert reason in decision.reason
    assert len(decision.checks) == 4
    # Without a promoted student there is nothing to keep within limits of, and base is the one to beat.
    assert decide(found, GATE, True, None).reason.startswith("accuracy final − base is −50.0 points")


def test_every_broken_limit_is_named():
    decision = decide(rivals(accuracy=(0, -1, 1), tokens=100, eos_rate=0.1, tasks=[(9, -2, -1)]), GATE, True, RIVAL)
    assert [check.passed for check in decision.checks] == [False] * 4
    assert decision.reason.count("; ") == 3


def entry(mark: str, run: str = "") -> dict:
    said = {"student": f"files/{mark}", "report": "r.html", "reason": "better", "verdict": "", "metrics": {}}
    return {"run": run or f"run-{mark}", "fingerprint": mark, "manifest": f"stages/report/{mark}/manifest.json", **said}


def test_promotion_moves_and_keeps_history(store: Store):
    assert current(store, "maths") is None
    assert promote(store, "maths", None, **entry("a")).previous is None
    assert promote(store, "maths", "a", **entry("b")).previous == 1
    assert current(store, "maths") == history(store, "maths")[-1]
    assert [(found.number, found.fingerprint) for found in history(store, "maths")] == [(1, "a"), (2, "b")]
    assert names(store) == ["maths"]


def test_of_two_that_beat_the_same_student_one_is_promoted(store: Store):
    promote(store, "maths", None, **entry("a"))
    assert promote(store, "maths", "a", **entry("b"))
    assert promote(store, "maths", "a", **entry("c")) is None
    assert promote(store, "maths", None, **entry("c")) is None
    # A run that is done again takes its own student's place.
    assert promote(store, "maths", "a", **entry("d", run="run-b")).number == 3


def test_many_promotions_at_once_leave_one(store: Store):
    promote(store, "maths", None, **entry("a"))
    with ThreadPoolExecutor(6) as pool:
        won = [found for found in pool.map(lambda mark: promote(store, "maths", "a", **entry(mark)), "bcdefg") if found]
    assert len(won) == 1
    assert current(store, "maths") == won[0]
    assert [found.number for found in history(store, "maths")] == [1, 2]


def test_promotion_again_changes_nothing(store: Store):
    promote(store, "maths", None, **entry("a"))
    second = promote(store, "maths", "a", **entry("b"))
    assert promote(store, "maths", "a", **entry("b")) == second
    # A crash between the move and its entry in the history: nothing is lost, and the next move files it.
    store.delete("promoted/maths/000002.json")
    assert history(store, "maths")[-1] == second
    promote(store, "maths", "b", **entry("c"))
    assert [found.fingerprint for found in history(store, "maths")] == ["a", "b", "c"]


def test_rollback_returns_step_by_step(store: Store):
    with pytest.raises(ValueError, match="no promoted student"):
        roll_back(store, "maths")
    for over, mark in ((None, "a"), ("a", "b"), ("b", "c")):
        promote(store, "maths", over, **entry(mark))
    now, before = roll_back(store, "maths")
    assert (now.fingerprint, now.action, now.number, now.replaced) == ("b", "rolled_back", 4, 3)
    assert before.fingerprint == "c"
    assert current(store, "maths") == now
    assert roll_back(store, "maths")[0].fingerprint == "a"
    with pytest.raises(ValueError, match="no student before"):
        roll_back(store, "maths")
    assert [found.fingerprint for found in history(store, "maths")] == ["a", "b", "c", "b", "a"]
    # The stage that promoted c is done again, as after a crash: the rollback stands.
    promote(store, "maths", "b", **entry("c"))
    assert current(store, "maths").fingerprint == "a"


def test_rollback_from_the_shell(tmp_path):
    store = LocalStore(tmp_path / "root")
    rollback = [sys.executable, "-m", "flows.cli", "rollback", "--root", str(tmp_path / "root")]
    promote(store, "maths", None, **entry("a"))
    refused = subprocess.run(rollback, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr == "error: --name: 'maths' has no student before files/a (entry 1)\n"
    promote(store, "maths", "a", **entry("b"))
    done = subprocess.run([*rollback, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["student"] == "files/a"
    promote(store, "other", None, **entry("a"))
    refused = subprocess.run(rollback, capture_output=True, text=True)
    assert refused.stderr.startswith("error: --name: 2 pipelines")


def test_stage_promotes_or_says_why_not(tmp_path):
    run = SyntheticRun(tmp_path, {"promote": {"metric": "accuracy"}})
    run.student("train", steps=2)
    run.evaluation("evaluate-before", ["teacher", "base"], 30)
    run.evaluation("evaluate-after", ["warmup", "final"], 30)
    stage, manifest = run.report()
    first = current(stage.store, "synthetic")
    assert manifest.facts["promoted"] is True
    assert first.student == manifest.facts["student"]
    assert first.metrics == manifest.facts["metrics"]
    assert (first.manifest, first.number) == (manifest.path, manifest.facts["promotion"])

    # A later run has to beat it on the same rows: its students are alike, so it does not.
    rival = {"label": "promoted", "fingerprint": first.fingerprint}
    run.evaluation("evaluate-again", ["warmup", "final", "promoted"], 30)
    run.paths["evaluate-after"] = run.paths["evaluate-again"]
    stage, manifest = run.report(inputs=["train", "evaluate-before", "evaluate-after"], rival=rival, run="later")
    assert manifest.facts["promoted"] is False
    assert "final − promoted" in manifest.facts["reason"]
    assert current(stage.store, "synthetic") == first
    page = stage.store.read(manifest.facts["report"]).decode()
    assert "Not promoted" in page
    assert "tasks got worse" in page


def test_a_student_that_was_overtaken_is_not_promoted_and_the_page_says_so(tmp_path):
    run = SyntheticRun(tmp_path, {"promote": {"metric": "accuracy"}})
    run.student("train", steps=2)
    run.evaluation("evaluate-before", ["teacher", "base"], 30)
    run.evaluation("evaluate-after", ["warmup", "final"], 30)
    promote(LocalStore(tmp_path), "synthetic", None, **entry("a"))
    stage, manifest = run.report(run="slow")
    assert manifest.facts["promoted"] is False
    assert "while this run went on" in manifest.facts["reason"]
    assert "while this run went on" in stage.store.read(manifest.facts["report"]).decode()
    assert current(stage.store, "synthetic").fingerprint == "a"

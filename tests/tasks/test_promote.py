"""Promotion and the verdict: what the intervals decide, and that the promoted student moves once and whole."""

import json

import pytest
from synthetic_run import SyntheticRun

from infra.store import LocalStore
from tasks.config.evaluate import PromoteConfig
from tasks.metrics import DIFFERENCES, LABELS, METRICS, Results
from tasks.promote import current, decide, move
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
    ("found", "promote", "has_student", "promoted", "reason"),
    [
        (BETTER, PromoteConfig(), True, True, "−0.400 nats per token, interval −0.500 to −0.300: better"),
        (BETTER, PromoteConfig(metric="accuracy"), True, False, "holds 0"),
        (BETTER, PromoteConfig(metric="rouge_l"), True, False, "not known"),
        (BETTER, PromoteConfig(enabled=False), True, False, "switched off"),
        (BETTER, PromoteConfig(), False, False, "no student"),
        (WORSE, PromoteConfig(), True, False, "worse than the base"),
    ],
)
def test_decision(found, promote, has_student, promoted, reason):
    decision = decide(found, promote, has_student)
    assert decision.promoted is promoted
    assert reason in decision.reason


def test_promotion_moves_and_keeps_history(tmp_path):
    store = LocalStore(tmp_path)
    assert current(store, "run") is None
    first = move(store, "run", "aaaa", {"student": "one"})
    assert first == "promoted/run/aaaa.json"
    assert current(store, "run")["previous"] is None
    move(store, "run", "bbbb", {"student": "two"})
    assert current(store, "run") == json.loads(store.read("promoted/run/bbbb.json"))
    assert current(store, "run")["previous"] == first
    assert json.loads(store.read(first))["student"] == "one"


def test_promotion_again_changes_nothing(tmp_path):
    store = LocalStore(tmp_path)
    move(store, "run", "aaaa", {"student": "one"})
    move(store, "run", "bbbb", {"student": "two"})
    before = store.read("promoted/run.json")
    move(store, "run", "bbbb", {"student": "two"})
    assert store.read("promoted/run.json") == before
    # A crash between history and pointer: the next attempt finishes it.
    store.write("promoted/run.json", store.read("promoted/run/aaaa.json"))
    move(store, "run", "bbbb", {"student": "two"})
    assert store.read("promoted/run.json") == before


def test_stage_promotes_or_says_why_not(tmp_path):
    run = SyntheticRun(tmp_path, {"promote": {"metric": "accuracy"}})
    run.student("train", steps=2)
    run.evaluation("evaluate-before", ["teacher", "base"], 30)
    run.evaluation("evaluate-after", ["warmup", "final"], 30)
    stage, manifest = run.report()
    entry = current(stage.store, "synthetic")
    assert manifest.facts["promoted"] is True
    assert entry["student"] == manifest.facts["student"]
    assert entry["metrics"] == manifest.facts["metrics"]
    assert manifest.facts["promoted_entry"] == f"promoted/synthetic/{manifest.fingerprint}.json"

    # A later run without an evaluation of the base cannot be compared: the promoted student stays.
    stage, manifest = run.report(inputs=["train", "evaluate-after"])
    assert manifest.facts["promoted"] is False
    assert "not known" in manifest.facts["reason"]
    assert current(stage.store, "synthetic") == entry

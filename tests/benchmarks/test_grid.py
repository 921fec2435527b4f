"""The grid of compared runs: cells that differ in what they should, and a report that finds what is in the figures."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import gains, results_page
from benchmarks.cells import todo
from benchmarks.grid import BUDGET, BUDGETS, GATES, METHODS, SEEDS, STAND_IN, Arm, Cell, core, grid, settings
from tasks.config import RunConfig

HOUSE = Path("/house")
ROOT = Path(__file__).parent.parent.parent


def differing(one: Any, other: Any, path: str = "") -> set[str]:
    if not isinstance(one, dict) or not isinstance(other, dict):
        return set() if one == other else {path}
    keys = one.keys() | other.keys()
    return set().union(*(differing(one.get(key), other.get(key), f"{path}.{key}".lstrip(".")) for key in keys))


def test_every_cell_is_a_valid_run_of_its_own() -> None:
    cells = grid()
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.arm for cell in cells} >= {Arm(method=name) for name in METHODS} | {Arm(gate=name) for name in GATES}
    for cell in cells:
        RunConfig.model_validate(settings(cell, HOUSE))


def test_the_core_comes_first_and_begins_with_pairs() -> None:
    first = grid()[: len(core()) * len(SEEDS)]
    assert {cell.arm for cell in first} == set(core())
    assert [(cell.arm.signals, cell.seed) for cell in first[:3]] == [("all", 1), ("none", 1), ("all", 2)]
    assert [cell.seed for cell in first[6:9]] == list(SEEDS)


@pytest.mark.parametrize(
    ("arm", "paths"),
    [
        (Arm(signals="none"), {"signals.use"}),
        (Arm(signals="one-stage"), {"budget.warmup_share", "train.steps", "signals.use"}),
        (Arm(signals="small-warmup"), {"budget.warmup_share", "signals.use"}),
        (Arm(signals=STAND_IN), {"signals.keep.stand_in", "signals.use"}),
        (Arm(budget=BUDGETS[0]), {"budget.queries"}),
        (Arm(gate="constant-0.2"), {"train.method.gate"}),
        (Arm(method="kd"), {"train.method.type", "train.method.max_new_tokens"}),
    ],
)
def test_an_ablation_is_one_setting(arm: Arm, paths: set[str]) -> None:
    plain, other = (settings(Cell(one, 1), HOUSE) for one in (Arm(), arm))
    assert differing(plain, other) - {"name"} == paths


def test_signals_by_name_set_their_rules() -> None:
    def signals(use: str) -> Any:
        data = settings(Cell(Arm(signals=use), 1), HOUSE)
        found = RunConfig.model_validate(data)
        assert RunConfig.model_validate(found.model_dump(mode="json")) == found
        return found.signals

    assert (signals("none").select.rule, signals("none").keep.rule) == ("random", "all")
    assert (signals("consistency").select.assistant_weight, signals("consistency").keep.rule) == (0, "all")
    assert signals("ta_student").select.consistency_weight == 0
    assert (signals("ta_teacher").select.rule, signals("ta_teacher").keep.rule) == ("random", "quantile")
    assert signals("all").select.rule == "signals"


def write(folder: Path, arm: Arm, seed: int, right: float, problems: int = 60, **more: Any) -> None:
    """A cell's file whose students are right with this probability; the same luck in all arms of a seed."""
    luck = np.random.default_rng(seed).random((2, 2, problems))
    correct = {
        label: {
            task: ["".join("1" if draw < share else "0" for draw in sample) for sample in luck[number]]
            for number, task in enumerate(("gcd", "sums"))
        }
        for label, share in (("final", right), ("teacher", 0.7), ("base", 0.1), ("warmup", 0.2))
    }
    result = {
        "cell": Cell(arm, seed).name,
        "arm": vars(arm),
        "seed": seed,
        "correct": correct,
        "answer_tokens": {"gcd": 10.0, "sums": 20.0},
        "seconds": 60.0,
        "teacher_tokens": 1000,
        "conditions": {"date": "2026-01-01", "processor": "a processor", "cores": 2, "load": 0.5},
        "models": {"teacher": "t1", "student": "s1"},
        **more,
    }
    (folder / f"{result['cell']}.json").write_text(json.dumps(result))


def test_the_report_finds_the_gains_that_are_there(tmp_path: Path) -> None:
    for seed in SEEDS:
        write(tmp_path, Arm(), seed, 0.6)
        write(tmp_path, Arm(signals="none"), seed, 0.4)
        write(tmp_path, Arm(method="gkd"), seed, 0.5)
        write(tmp_path, Arm(method="kd"), seed, 0.3)
    found = gains.load(tmp_path)
    summary = gains.summary(found)
    assert summary["cells"] == 12
    assert summary["signals_relative_gain"] == pytest.approx(0.5, abs=0.12)
    low, high = summary["signals_gain_interval"]
    assert 0.2 < low < summary["signals_relative_gain"] < high < 0.9
    assert summary["best_other"] == "gkd"
    assert summary["switch_minus_best_other"] == pytest.approx(0.1, abs=0.04)
    assert summary["switch_interval"][0] > 0
    assert summary["tasks_at_or_above_teacher"] == 0
    assert "## Methods" in results_page.text(found, summary)


def test_arms_that_are_alike_have_an_interval_around_nothing(tmp_path: Path) -> None:
    for seed, (one, other) in enumerate([(0.4, 0.6), (0.5, 0.5), (0.6, 0.4)], 1):
        write(tmp_path, Arm(), seed, one)
        write(tmp_path, Arm(signals="none"), seed, other)
    low, high = gains.summary(gains.load(tmp_path))["signals_gain_interval"]
    assert low < 0 < high


def test_only_seeds_that_both_arms_have_are_compared(tmp_path: Path) -> None:
    write(tmp_path, Arm(), 1, 0.6)
    write(tmp_path, Arm(), 2, 0.0)
    write(tmp_path, Arm(signals="none"), 1, 0.6)
    summary = gains.summary(gains.load(tmp_path))
    assert summary["signals_relative_gain"] == 0
    assert (summary["switch_minus_best_other"], summary["switch_interval"]) == (None, None)


def test_at_equal_tokens_none_is_read_between_its_budgets(tmp_path: Path) -> None:
    none = [Arm(signals="none", budget=budget) for budget in BUDGETS]
    for seed in SEEDS:
        write(tmp_path, Arm(), seed, 0.6, teacher_tokens=3000)
        for arm, right, tokens in zip(none, (0.2, 0.3, 0.5), (1000, 2000, 4000), strict=True):
            write(tmp_path, arm, seed, right, teacher_tokens=tokens)
        write(tmp_path, Arm(budget=BUDGETS[2]), seed, 0.7, teacher_tokens=5000)
        write(tmp_path, Arm(budget=BUDGETS[0]), seed, 0.3, teacher_tokens=995)
    found = gains.load(tmp_path)
    summary = gains.summary(found)
    equal = summary["at_equal_tokens"]
    own, below, above = (gains.accuracy(gains.shares(found[arm], SEEDS)) for arm in (Arm(), none[1], none[2]))
    # Halfway between 2,000 and 4,000 tokens.
    assert equal[BUDGET]["value"] == pytest.approx(own / (below / 2 + above / 2) - 1, abs=1e-4)
    assert (equal[BUDGET]["tokens"], equal[BUDGET]["budgets"]) == (3000, list(BUDGETS[1:]))
    low, high = equal[BUDGET]["interval"]
    assert low < equal[BUDGET]["value"] < high
    assert equal[BUDGET]["value"] < summary["by_signals"]["all"]["value"]
    assert summary["by_signals"]["all"]["tokens"] == 1.5
    # Less than a hundredth below the smallest budget's.
    smallest = gains.accuracy(gains.shares(found[none[0]], SEEDS))
    own = gains.accuracy(gains.shares(found[Arm(budget=BUDGETS[0])], SEEDS))
    assert equal[BUDGETS[0]]["value"] == pytest.approx(own / smallest - 1, abs=1e-4)
    # More tokens than no signals had anywhere: nothing can be said.
    assert equal[BUDGETS[2]] is None
    page = results_page.text(found, summary)
    assert f"| {BUDGET} | 3,000 | {BUDGET} and {BUDGETS[2]} | +" in page
    assert f"| {BUDGETS[2]} | – | no cells on either side |" in page
    assert "- The same at equal teacher tokens: +" in page
    assert "against plain fine-tuning: " not in page


def test_cells_of_other_house_models_are_refused(tmp_path: Path) -> None:
    write(tmp_path, Arm(), 1, 0.6)
    write(tmp_path, Arm(signals="none"), 1, 0.6, models={"teacher": "t1", "student": "s2"})
    with pytest.raises(ValueError, match=f"its student is s2, that of switch-all-{BUDGET}-seed1 is s1") as caught:
        gains.load(tmp_path)
    assert "\n" not in str(caught.value)
    command = [sys.executable, "-m", "benchmarks.methods", "--report", "--results", str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert said.returncode == 2
    assert said.stderr.startswith("error: ")


def test_without_cells_everything_is_unknown(tmp_path: Path) -> None:
    summary = gains.summary(gains.load(tmp_path))
    assert {key: summary[key] for key in gains.KEYS} == {**dict.fromkeys(gains.KEYS), "cells": 0}
    assert "No cells" in results_page.text({}, summary)


def test_cells_with_a_result_are_not_run_again(tmp_path: Path) -> None:
    write(tmp_path, Arm(), 2, 0.5)
    assert todo([Cell(Arm(), seed) for seed in SEEDS], tmp_path) == [Cell(Arm(), 1), Cell(Arm(), 3)]


def test_the_page_and_its_plot_are_written(tmp_path: Path) -> None:
    write(tmp_path, Arm(), 1, 0.6)
    found = gains.load(tmp_path)
    results_page.write(found, gains.summary(found), folder=tmp_path)
    assert f"| `switch` | all | {BUDGET} | 1 |" in (tmp_path / "results.md").read_text()
    for name in ("results-arms.png", "results-budgets.png"):
        assert (tmp_path / name).stat().st_size > 1000

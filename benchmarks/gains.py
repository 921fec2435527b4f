"""What the committed cells say: accuracies by arm, gains of signals and of SWITCH, with intervals.

Accuracy is the mean over tasks of a task's share of right answers. Intervals resample seeds and, within each task,
problems, 2,000 times (the two-way bootstrap of `kernels/bootstrap.py`); two arms are compared on the same draws, and on
the seeds that both have. With one seed only problems are resampled. Cells of other house models are not compared.

Arms of one budget have equally many teacher queries, not equally many teacher tokens (read and written in annotation,
decided in rollouts). At equal tokens an arm is compared with the straight line between those two budgets of the other
whose tokens lie on either side of its own; nothing is said more than a hundredth beyond the largest or below the
smallest budget.

Shapes: P problems of a task, S seeds, R resamples.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.grid import BUDGET, BUDGETS, GATES, METHOD, METHODS, PUBLISHED_TEACHER_SHARE, SIGNALS, STAND_IN, Arm

RESAMPLES = 2000
# So near to the tokens of the largest or smallest budget is at them.
NEAR = 0.01
KEYS = (
    "signals_relative_gain",
    "signals_gain_interval",
    "switch_minus_best_other",
    "switch_interval",
    "tasks_at_or_above_teacher",
    "cells",
)
Found = dict[Arm, dict[int, dict[str, Any]]]
# By task: shares of right answers [P, S].
Grid = dict[str, NDArray]


def load(folder: Path) -> Found:
    """Results by arm and seed. ValueError where they are of different house models."""
    found: Found = {}
    first: Any = None
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        first = first or result
        if others := [role for role, mark in result["models"].items() if first["models"].get(role) != mark]:
            raise ValueError(
                f"{path}: its {others[0]} is {result['models'][others[0]]}, that of {first['cell']} is "
                f"{first['models'].get(others[0])}: cells of different house models are no comparison, remove the old "
                "ones and run them again"
            )
        found.setdefault(Arm(**result["arm"]), {})[result["seed"]] = result
    return found


def shares(cells: dict[int, dict[str, Any]], seeds: Iterable[int], label: str = "final") -> Grid:
    """By task, each problem's share of right answers [P, S] in the cells of these seeds."""
    found: dict[str, list[NDArray]] = {}
    for seed in seeds:
        for task, samples in cells[seed]["correct"][label].items():
            marks_EP = np.array([[mark == "1" for mark in sample] for sample in samples], np.float64)
            found.setdefault(task, []).append(marks_EP.mean(0))
    return {task: np.stack(columns, 1) for task, columns in found.items()}


def accuracy(grid: Grid) -> float:
    """The mean over tasks."""
    return float(np.mean([values.mean() for values in grid.values()]))


def interval(
    arms: list[Grid], figure: Callable[..., Any], *, resamples: int = RESAMPLES, seed: int = 0
) -> list[float] | None:
    """The 95 % percentile interval of a figure of the arms' accuracies; all arms have the same problems and seeds."""
    generator, first = np.random.default_rng(seed), arms[0]
    width = next(iter(first.values())).shape[1]
    seeds_RS = drawn(generator, width, resamples) / width
    problems = {task: drawn(generator, len(values), resamples) / len(values) for task, values in first.items()}
    means = [
        np.mean([((problems[task] @ values_PS) * seeds_RS).sum(1) for task, values_PS in arm.items()], 0)
        for arm in arms
    ]
    figures_R = figure(*means)
    known = figures_R[np.isfinite(figures_R)]
    return [round(float(bound), 4) for bound in np.quantile(known, [0.025, 0.975])] if len(known) else None


def drawn(generator: np.random.Generator, size: int, resamples: int) -> NDArray:
    """How often each of so many is drawn, with replacement, in each resample [R, size]."""
    return generator.multinomial(size, np.full(size, 1 / size), resamples).astype(np.float64)


def compared(found: Found, one: Arm, other: Arm, figure: Callable[..., Any]) -> dict[str, Any] | None:
    """A figure of two arms with its interval, and the first one's teacher tokens as a share of the other's; None where
    no seed has both."""
    seeds = sorted(found.get(one, {}).keys() & found.get(other, {}).keys())
    if not seeds:
        return None
    grids = [shares(found[arm], seeds) for arm in (one, other)]
    value = figure(*map(accuracy, grids))
    tokens = round(tokens_of(found[one], seeds) / tokens_of(found[other], seeds), 3)
    return {"value": round(float(value), 4), "interval": interval(grids, figure), "seeds": seeds, "tokens": tokens}


def tokens_of(cells: dict[int, dict[str, Any]], seeds: list[int]) -> float:
    """Teacher tokens of a cell, the mean over these seeds."""
    return mean(cells[seed]["teacher_tokens"] for seed in seeds)


def at_equal_tokens(found: Found, one: Arm, other: Arm) -> dict[str, Any] | None:
    """The relative gain of an arm over another with as many teacher tokens; None where no cells tell."""
    arms = [replace(other, budget=budget) for budget in BUDGETS]
    own, ladder = found.get(one, {}), [(arm, found[arm]) for arm in arms if arm in found]
    for place, ((less, below), (more, above)) in enumerate(pairwise(ladder)):
        seeds = sorted(own.keys() & below.keys() & above.keys())
        if not seeds:
            continue
        wanted, low, high = (tokens_of(cells, seeds) for cells in (own, below, above))
        bottom, top = low * (1 - NEAR * (place == 0)), high * (1 + NEAR * (place == len(ladder) - 2))
        if not bottom <= wanted <= top or low == high:
            continue
        share = min(max((wanted - low) / (high - low), 0.0), 1.0)

        def figure(own: Any, below: Any, above: Any, share: float = share) -> Any:
            return relative(own, (1 - share) * below + share * above)

        grids = [shares(found[arm], seeds) for arm in (one, less, more)]
        value = figure(*map(accuracy, grids))
        between = {"value": round(float(value), 4), "interval": interval(grids, figure), "seeds": seeds}
        return {**between, "tokens": round(wanted), "budgets": [less.budget, more.budget]}
    return None


def relative(one: Any, other: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(one, other) - 1


def difference(one: Any, other: Any) -> Any:
    return one - other


def arm_row(arm: Arm, cells: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One arm: its accuracy, what it cost, how often the teacher wrote."""
    seeds = sorted(cells)
    grid = shares(cells, seeds)

    def average(key: str) -> float | None:
        known = [cell[key] for cell in cells.values() if cell.get(key) is not None]
        return mean(known) if known else None

    return {
        "arm": arm,
        "seeds": seeds,
        "accuracy": accuracy(grid),
        "interval": interval([grid], lambda value: value),
        "tasks": {task: float(values.mean()) for task, values in grid.items()},
        "intervention_rate": average("intervention_rate"),
        "published": PUBLISHED_TEACHER_SHARE.get(arm.gate) if arm.method == METHOD else None,
        "teacher_tokens": average("teacher_tokens"),
        "online_teacher_tokens": average("online_teacher_tokens"),
        "response_length": average("response_length"),
        "seconds": average("seconds"),
    }


def summary(found: Found) -> dict[str, Any]:
    """All figures; KEYS among them. What has no cells yet is None."""
    gain = compared(found, Arm(), Arm(signals="none"), relative)
    others = {
        arm: result
        for name in METHODS
        if name != METHOD and (result := compared(found, Arm(), arm := Arm(method=name), difference))
    }
    # The best other method is the one that SWITCH is least ahead of, on the seeds that both have.
    best = min(others, key=lambda arm: others[arm]["value"], default=None)
    switch = others[best] if best else None
    rows = [arm_row(arm, cells) for arm, cells in found.items()]
    return {
        "signals_relative_gain": gain and gain["value"],
        "signals_gain_interval": gain and gain["interval"],
        "switch_minus_best_other": switch and switch["value"],
        "switch_interval": switch and switch["interval"],
        "tasks_at_or_above_teacher": at_teacher(found) if found else None,
        "cells": sum(map(len, found.values())),
        "best_other": best and best.method,
        "arms": rows,
        "start": start(found),
        "by_signals": by_signals(found, BUDGET),
        "other_budgets": {budget: by_signals(found, budget) for budget in BUDGETS if budget != BUDGET},
        "two_stages": {
            f"{name}, {budget} queries": compared(
                found, Arm(budget=budget), Arm(signals=name, budget=budget), difference
            )
            for name in ("one-stage", "small-warmup")
            for budget in BUDGETS
        },
        "signals_by_method": {
            name: result
            for name in METHODS
            if (result := compared(found, Arm(method=name), Arm(method=name, signals="none"), relative))
        },
        "against_fine_tuning": compared(found, Arm(), Arm(method="sft", signals="none"), relative),
        "at_equal_tokens": {
            arm.budget: at_equal_tokens(found, arm, Arm(signals="none"))
            for arm in (Arm(budget=budget) for budget in BUDGETS)
            if arm in found
        },
        "methods": {arm.method: result for arm, result in others.items()},
        "without_signals": {
            name: result
            for name in METHODS
            if name != METHOD
            and (result := compared(found, Arm(signals="none"), Arm(method=name, signals="none"), difference))
        },
        "gates": {gate: result for gate in GATES if (result := compared(found, Arm(gate=gate), Arm(), difference))},
        "by_length": by_length(found, best),
    }


def by_signals(found: Found, budget: int) -> dict[str, dict[str, Any] | None]:
    """Relative gains over no signals at a budget."""
    names = [name for name in (*SIGNALS, STAND_IN) if name != "none"]
    none = Arm(signals="none", budget=budget)
    return {name: compared(found, Arm(signals=name, budget=budget), none, relative) for name in names}


def start(found: Found) -> dict[str, dict[str, float]]:
    """The teacher's and the untrained student's accuracy by task, over the first arm's seeds."""
    first = next(iter(found.values()), {})
    grids = {label: shares(first, sorted(first), label) for label in ("teacher", "base")}
    return {label: {task: float(values.mean()) for task, values in grid.items()} for label, grid in grids.items()}


def at_teacher(found: Found) -> int:
    """Tasks in which the best arm's mean over its seeds is at or above the teacher's over the same seeds."""
    reached = set()
    for cells in found.values():
        final, teacher = (shares(cells, sorted(cells), label) for label in ("final", "teacher"))
        reached |= {task for task in final if final[task].mean() >= teacher[task].mean()}
    return len(reached)


def by_length(found: Found, best: Arm | None) -> list[dict[str, Any]]:
    """SWITCH's lead by task, tasks in the order of the teacher's mean answer length."""
    if best is None:
        return []
    seeds = sorted(found[Arm()].keys() & found[best].keys())
    one, other = (shares(found[arm], seeds) for arm in (Arm(), best))
    lengths = found[Arm()][seeds[0]]["answer_tokens"]
    return [
        {
            "task": task,
            "tokens": lengths[task],
            "lead": round(float(one[task].mean() - other[task].mean()), 4),
            "interval": interval([{task: one[task]}, {task: other[task]}], difference),
        }
        for task in sorted(one, key=lengths.__getitem__)
    ]

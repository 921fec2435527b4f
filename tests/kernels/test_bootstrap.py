"""Bootstrap and calibration: plain twins, cases worked by hand, and properties."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import bootstrap
from kernels.bootstrap import Interval, difference_interval, mean_interval
from kernels.calibration import auroc, brier, reliability, wilson


def plain_interval(rows, weights, resamples, confidence, seed):
    """The definition, cell by cell: the same draws, no matrix product."""
    alive = [
        (row, weight) for row, weight in zip(rows, weights, strict=True) if weight and any(x is not None for x in row)
    ]
    problems, seeds = len(alive), len(rows[0])
    problem_draws, seed_draws = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    means = []
    for _ in range(resamples):
        columns = seed_draws.integers(seeds, size=seeds).tolist() if seeds else []
        total = mass = 0.0
        for index in problem_draws.integers(problems, size=problems).tolist():
            row, weight = alive[index]
            for column in columns:
                if row[column] is not None:
                    total, mass = total + weight * row[column], mass + weight
        if mass:
            means.append(total / mass)
    return [float(np.quantile(means, q)) for q in ((1 - confidence) / 2, (1 + confidence) / 2)]


def with_nan(rows):
    return np.array([[math.nan if x is None else x for x in row] for row in rows], np.float64)


def test_equals_the_plain_definition():
    source = random.Random(0)
    for problems, seeds in [(2, 1), (3, 2), (17, 5), (40, 3)]:
        rows = [[source.choice([None, 0.0, 1.0, source.random()]) for _ in range(seeds)] for _ in range(problems)]
        rows[0], rows[1] = [0.25] * seeds, [0.5] * seeds
        weights = [source.randrange(5) for _ in rows]
        weights[0] = weights[1] = 2
        found = mean_interval(with_nan(rows), weights=weights, resamples=100, confidence=0.9, seed=7)
        assert found[1:] == pytest.approx(plain_interval(rows, weights, 100, 0.9, 7), abs=1e-12)


def test_worked_by_hand():
    # Two problems, 0 and 1: a resample's mean is 0, ½ or 1 with probability ¼, ½, ¼.
    assert mean_interval([0, 1], confidence=0.95) == Interval(0.5, 0.0, 1.0)
    assert mean_interval([0, 1], confidence=0.4) == Interval(0.5, 0.5, 0.5)
    # Weighted: (1·2 + 3·4) / 4.
    assert mean_interval([2, 4], weights=[1, 3]).mean == 3.5
    # Cells are pooled: three known ones.
    assert mean_interval([[1, 2], [6, math.nan]]).mean == 3
    # Paired: every problem gains 0.1, so the interval has no width though the values spread widely.
    values = np.arange(10.0)
    assert difference_interval(values + 0.5, values) == Interval(0.5, 0.5, 0.5)
    # A cell unknown on one side counts on neither.
    assert difference_interval([1, 5, 3], [0, math.nan, 1]).mean == 1.5


def test_nothing_and_one_problem():
    assert all(math.isnan(x) for x in mean_interval([]))
    assert all(math.isnan(x) for x in mean_interval(np.full((3, 2), math.nan)))
    one = mean_interval([[0.5, 0.7]])
    assert one.mean == pytest.approx(0.6)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    # A problem of no weight, or with nothing known, is no problem.
    assert math.isnan(mean_interval([[0.5, 0.7], [math.nan, math.nan]]).low)
    assert math.isnan(mean_interval([0.5, 0.7], weights=[1, 0]).low)


def test_sparse_cells_leave_resamples_out():
    found = mean_interval([[1, math.nan], [math.nan, 2]], resamples=500)
    assert (found.low, found.high) == (1, 2)


def test_seeded_and_independent_of_chunks(monkeypatch):
    values = np.random.default_rng(1).random((50, 4))
    whole = mean_interval(values, resamples=300, seed=3)
    assert whole == mean_interval(values, resamples=300, seed=3)
    assert whole != mean_interval(values, resamples=300, seed=4)
    monkeypatch.setattr(bootstrap, "CHUNK", 50 * 7)
    assert mean_interval(values, resamples=300, seed=3) == pytest.approx(whole, abs=1e-12)


def test_covers_the_truth_as_often_as_it_says():
    """Problems of known spread, one response each: the 90 % interval holds the true mean in about 90 of 100 worlds."""
    worlds = np.random.default_rng(0)
    hits = 0
    for world in range(300):
        found = mean_interval(worlds.normal(size=60), resamples=400, confidence=0.9, seed=world)
        hits += found.low <= 0 <= found.high
    # 5 standard deviations around 0.89, which 60 problems give.
    assert 0.8 < hits / 300 < 0.98


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="one weight"):
        mean_interval([1, 2], weights=[1])
    with pytest.raises(ValueError, match="one weight"):
        mean_interval([1, 2], weights=[1, -1])
    with pytest.raises(ValueError, match="align"):
        difference_interval([1, 2], [1])


cells = st.one_of(st.none(), st.floats(-1e3, 1e3))
grids = st.integers(1, 4).flatmap(
    lambda seeds: st.lists(st.lists(cells, min_size=seeds, max_size=seeds), min_size=1, max_size=12)
)


@settings(max_examples=60, deadline=None)
@given(grids, st.integers(0, 5))
def test_bounds_lie_within_the_values_and_move_with_them(rows, seed):
    values = with_nan(rows)
    found = mean_interval(values, resamples=100, seed=seed)
    if np.isnan(values).all():
        assert math.isnan(found.mean)
        return
    assert np.nanmin(values) - 1e-9 <= found.mean <= np.nanmax(values) + 1e-9
    if not math.isnan(found.low):
        assert np.nanmin(values) - 1e-9 <= found.low <= found.high <= np.nanmax(values) + 1e-9
        moved = mean_interval(-2 * values, resamples=100, seed=seed)
        assert (moved.low, moved.high) == pytest.approx((-2 * found.high, -2 * found.low), abs=1e-6)
        assert difference_interval(values, values, seed=seed) == Interval(0, 0, 0)


def plain_auroc(confidence, correct):
    wins = [
        (a > b) + (a == b) / 2
        for a, right in zip(confidence, correct, strict=True)
        if right
        for b, other in zip(confidence, correct, strict=True)
        if not other
    ]
    return sum(wins) / len(wins) if wins else math.nan


scored = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.99, 1.0]), st.booleans()), max_size=30)


@settings(max_examples=100, deadline=None)
@given(scored)
def test_calibration_equals_the_plain_definitions(rows):
    confidence, correct = [c for c, _ in rows], [right for _, right in rows]
    assert auroc(confidence, correct) == pytest.approx(plain_auroc(confidence, correct), nan_ok=True)
    errors = [(c - right) ** 2 for c, right in rows]
    assert brier(confidence, correct) == pytest.approx(sum(errors) / len(errors) if errors else math.nan, nan_ok=True)
    found = reliability(confidence, correct, bins=4)
    for k in range(4):
        inside = [(c, right) for c, right in rows if k / 4 <= c < (k + 1) / 4 or (k == 3 and c == 1)]
        assert found.counts[k] == len(inside)
        for part, column in ((found.confidence, 0), (found.accuracy, 1)):
            mean = sum(row[column] for row in inside) / len(inside) if inside else math.nan
            assert part[k] == pytest.approx(mean, nan_ok=True)


def test_calibration_worked_by_hand():
    assert auroc([0.9, 0.8, 0.3], [True, False, False]) == 1
    assert auroc([0.5, 0.5], [True, False]) == 0.5
    assert brier([1, 0, 0.5], [True, True, False]) == pytest.approx((0 + 1 + 0.25) / 3)
    with pytest.raises(ValueError, match="leave these answers out"):
        auroc([0.5, math.nan], [True, False])
    with pytest.raises(ValueError, match="one mark"):
        brier([0.5], [True, False])


def test_wilson_by_its_equation():
    # The bounds are where |share − p| = z √(p (1 − p) / n).
    for successes, trials in [(0, 10), (3, 10), (10, 10), (1, 1), (700, 1000)]:
        low, high = wilson(successes, trials)
        share = successes / trials
        for p in (low, high):
            if 0 < p < 1:
                assert abs(share - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / trials), abs=1e-6)
        assert low - 1e-12 <= share <= high + 1e-12
    assert wilson(0, 0) == (0, 1)

"""Bootstrap intervals of means over held-out problems and sampling seeds, and of paired differences.

One resample draws problems with replacement and, independently, seeds with replacement; a cell counts as often as its
problem was drawn times its seed was drawn (the two-way bootstrap of Owen 2007, "The pigeonhole bootstrap"). Where
responses to one problem hardly agree with each other its intervals err on the wide side. With one seed only problems
are resampled.

Shapes: P problems, S seeds (responses to one problem), R resamples.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Drawn indices held at once, whatever the number of problems: 32 MiB of them.
CHUNK = 1 << 22


class Interval(NamedTuple):
    """A mean and the percentile interval around it. NaN: nothing is known (mean), or one problem only (bounds)."""

    mean: float
    low: float
    high: float


def mean_interval(
    values: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The mean over all known cells of `values`, [P] or [P, S], and its bootstrap interval.

    NaN marks an unknown cell; problems without a known cell are left out. `weights` [P] (such as tokens of a
    reference) make it Σ w x / Σ w. Equal arguments give equal bounds. ValueError for weights that are negative or do
    not fit.
    """
    values_PS = np.asarray(values, np.float64)
    values_PS = values_PS[:, None] if values_PS.ndim == 1 else values_PS
    weights_P = np.ones(len(values_PS)) if weights is None else np.asarray(weights, np.float64)
    if weights_P.shape != values_PS.shape[:1] or not (weights_P >= 0).all():
        raise ValueError(f"weights {weights_P.shape} of values {values_PS.shape}: one weight ≥ 0 a problem is needed")
    known_PS = ~np.isnan(values_PS)
    alive_P = known_PS.any(1) & (weights_P > 0)
    values_PS, known_PS, weights_P = values_PS[alive_P], known_PS[alive_P], weights_P[alive_P]
    if not len(values_PS):
        return Interval(np.nan, np.nan, np.nan)
    mass_PS = weights_P[:, None] * known_PS
    sums_PS = mass_PS * np.where(known_PS, values_PS, 0)
    mean = float(sums_PS.sum() / mass_PS.sum())
    if len(values_PS) == 1:
        return Interval(mean, np.nan, np.nan)
    means_R = _resampled_means(sums_PS, mass_PS, resamples, seed)
    # A resample may meet unknown cells only.
    low, high = np.nanquantile(means_R, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean, float(low), float(high))


def difference_interval(
    first: ArrayLike,
    second: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The paired difference first − second, cell by cell; a cell unknown in either is left out.

    Pairing removes what makes problems differ from each other, so this can exclude 0 where the two intervals overlap.
    Arguments and errors as of `mean_interval`; both arrays have one shape.
    """
    first_PS, second_PS = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first_PS.shape != second_PS.shape:
        raise ValueError(f"paired values of shapes {first_PS.shape} and {second_PS.shape}: align problems and seeds")
    return mean_interval(first_PS - second_PS, weights=weights, resamples=resamples, confidence=confidence, seed=seed)


def _resampled_means(sums_PS: NDArray, mass_PS: NDArray, resamples: int, seed: int) -> NDArray:
    """Means [R]: Σ counts · sums / Σ counts · mass, counts being those of drawn problems times those of drawn seeds."""
    problems, seeds = mass_PS.shape
    # A stream each, so that neither depends on how resamples are cut into chunks.
    problem_draws, seed_draws = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    chunk = max(1, CHUNK // problems)
    means = []
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        counts_RP = _counts(problem_draws.integers(problems, size=(rows, problems)), problems)
        counts_RS = _counts(seed_draws.integers(seeds, size=(rows, seeds)), seeds)
        with np.errstate(invalid="ignore"):
            means.append(((counts_RP @ sums_PS) * counts_RS).sum(1) / ((counts_RP @ mass_PS) * counts_RS).sum(1))
    return np.concatenate(means)


def _counts(drawn_RN: NDArray, size: int) -> NDArray:
    """How often each of 0 … size − 1 was drawn in each row, [R, size], as floats."""
    rows = len(drawn_RN)
    offset_RN = drawn_RN + np.arange(rows)[:, None] * size
    return np.bincount(offset_RN.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)

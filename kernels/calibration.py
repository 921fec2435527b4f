"""How well a confidence knows correctness: ranking (AUROC), error (Brier), reliability bins, and Wilson intervals; and
the map that makes it know better.

Shapes: N scored answers, K bins or knots. Confidences lie in [0, 1], `correct` holds booleans.
"""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Reliability(NamedTuple):
    """Bins of equal width over [0, 1]: counts, mean confidence and share correct, all [K]; NaN in empty bins."""

    counts: NDArray
    confidence: NDArray
    accuracy: NDArray


def auroc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Probability that a correct answer has a higher confidence than an incorrect one, ties counted half: the
    Mann-Whitney statistic over its maximum. NaN where one of the two kinds is missing."""
    confidence_N, correct_N = _pair(confidence, correct)
    positives, negatives = int(correct_N.sum()), int((~correct_N).sum())
    if not positives or not negatives:
        return float("nan")
    _, group_N, sizes = np.unique(confidence_N, return_inverse=True, return_counts=True)
    # Equal confidences share the mean of the ranks they take up.
    ranks = np.cumsum(sizes) - (sizes - 1) / 2
    excess = ranks[group_N][correct_N].sum() - positives * (positives + 1) / 2
    return float(excess / (positives * negatives))


def brier(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Mean squared error of the confidence as a probability (Brier 1950, halved as is usual): 0 best, 0.25 for a
    constant ½. NaN for no answer."""
    confidence_N, correct_N = _pair(confidence, correct)
    return float(np.mean((confidence_N - correct_N) ** 2)) if len(correct_N) else float("nan")


def reliability(confidence: ArrayLike, correct: ArrayLike, bins: int = 10) -> Reliability:
    """Share correct against mean confidence in bins of equal width; a confidence of 1 belongs to the last one."""
    confidence_N, correct_N = _pair(confidence, correct)
    bin_N = np.minimum((confidence_N * bins).astype(np.int64), bins - 1)
    counts_K = np.bincount(bin_N, minlength=bins)
    with np.errstate(invalid="ignore"):
        return Reliability(
            counts_K,
            np.bincount(bin_N, confidence_N, minlength=bins) / counts_K,
            np.bincount(bin_N, correct_N, minlength=bins) / counts_K,
        )


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a share (Wilson 1927), which stays honest at 0 and 1 where a bootstrap has no width."""
    if not trials:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * (share * (1 - share) / trials + (z / (2 * trials)) ** 2) ** 0.5
    scale = 1 + z * z / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


class Isotonic(NamedTuple):
    """A map from confidence to the share correct that never falls: straight between its knots [K], flat outside."""

    confidence: NDArray
    accuracy: NDArray

    def __call__(self, confidence: ArrayLike) -> NDArray:
        return np.interp(np.asarray(confidence, np.float64), self.confidence, self.accuracy)


def isotonic(confidence: ArrayLike, correct: ArrayLike) -> Isotonic:
    """The rising map of least squared error (Zadrozny & Elkan 2002). ValueError without an answer to fit."""
    # Takes a second to import, which a stage that calibrates nothing does without.
    from scipy.optimize import isotonic_regression

    confidence_N, correct_N = _pair(confidence, correct)
    if not len(correct_N):
        raise ValueError("no answer to fit a calibration to")
    knots_K, knot_N, counts_K = np.unique(confidence_N, return_inverse=True, return_counts=True)
    shares_K = np.bincount(knot_N, correct_N) / counts_K
    return Isotonic(knots_K, isotonic_regression(shares_K, weights=counts_K).x)


def _pair(confidence: ArrayLike, correct: ArrayLike) -> tuple[NDArray, NDArray]:
    confidence_N, correct_N = np.asarray(confidence, np.float64), np.asarray(correct, bool)
    if confidence_N.shape != correct_N.shape:
        raise ValueError(f"confidences {confidence_N.shape} and marks {correct_N.shape}: one mark an answer is needed")
    if not ((confidence_N >= 0) & (confidence_N <= 1)).all():
        raise ValueError("confidences outside 0 to 1, or unknown: leave these answers out")
    return confidence_N, correct_N

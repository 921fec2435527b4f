"""Self-consistency of one prompt's answers, and the rank average that turns several signals into one uncertainty.

    python -m pytest tests/kernels/test_consistency.py

With n answers of which k are distinct, answer i occurring c_i times:

    unique = k          majority share = max_i c_i / n          entropy = −Σ_i (c_i/n) ln(c_i/n) / ln n   in [0, 1]

An answer that could not be extracted (None) agrees with nothing, not even with another None: five responses without an
answer are five unique answers, the most uncertain a student can be. It becomes the majority only where nothing was
extracted at all.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Consistency:
    """What one prompt's answers agree on."""

    unique: int
    majority_share: float
    entropy: float
    """Normalised to 0 (all agree) … 1 (all differ); 0 for a single answer."""
    majority_answer: str | None
    majority_index: int
    """First of the answers that is the majority answer."""


def tie_break(key: str, answer: str) -> bytes:
    """Orders answers of equal count. The key (the prompt's id) enters, or one answer would win every prompt's ties."""
    return hashlib.sha256(f"{key}\0{answer}".encode("utf-8", "surrogatepass")).digest()


def consistency(answers: Sequence[str | None], key: str) -> Consistency:
    """Agreement of n normalised answers to the prompt named ``key``. ValueError where there are none."""
    if not answers:
        raise ValueError("consistency of no answers: sample at least one")
    counts = Counter(answer for answer in answers if answer is not None)
    missing = len(answers) - counts.total()
    shares = np.array([*counts.values(), *[1] * missing]) / len(answers)
    majority = min(counts, key=lambda answer: (-counts[answer], tie_break(key, answer)), default=None)
    entropy = float(-(shares * np.log(shares)).sum() / np.log(len(answers))) if len(answers) > 1 else 0.0
    return Consistency(
        unique=len(shares),
        majority_share=(counts[majority] if majority is not None else 1) / len(answers),
        entropy=min(max(entropy, 0.0), 1.0),
        majority_answer=majority,
        majority_index=answers.index(majority),
    )


def rank_share(values_N: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Ranks of N values, scaled to 0 (smallest) … 1 (largest); equal values share the mean of their ranks, and all
    equal values are 0.5. ValueError for NaN, which has no rank."""
    values_N = np.asarray(values_N)
    sorted_N = np.sort(values_N)
    if len(sorted_N) and np.isnan(sorted_N[-1]):
        raise ValueError("rank of NaN: give every row a value")
    if not len(sorted_N) or sorted_N[0] == sorted_N[-1]:
        return np.full(len(values_N), 0.5)
    # Zero-based ranks of equal values run from (those below) to (those below or equal − 1). In place: N may be large.
    ends_N = np.searchsorted(sorted_N, values_N, "right")
    ends_N += np.searchsorted(sorted_N, values_N, "left")
    ends_N -= 1
    return ends_N / (2 * (len(values_N) - 1))


def rank_average(columns: Sequence[npt.ArrayLike], weights: Sequence[float]) -> npt.NDArray[np.float64]:
    """Uncertainty in [0, 1] of N rows: the weighted mean of each column's ``rank_share``. Larger values of a column
    mean more uncertain; columns of weight 0 are not read. ValueError where no weight is positive or one is negative."""
    if len(columns) != len(weights) or min(weights, default=0) < 0 or not any(weights):
        raise ValueError(
            f"weights {list(weights)} of {len(columns)} signals: none may be negative, one must be above 0"
        )
    # In place: N may be large.
    total_N = np.zeros(len(np.asarray(columns[0])))
    for column, weight in zip(columns, weights, strict=True):
        if weight:
            share_N = rank_share(column)
            share_N *= weight
            total_N += share_N
    total_N /= sum(weights)
    return np.clip(total_N, 0.0, 1.0, out=total_N)

"""Quantiles of more confidences than need fit in memory.

Shapes: N values of a part. Values are float32 and not negative, NaN for none.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

HALF = 1 << 16


class Neighbours(NamedTuple):
    """The values between which a quantile lies, and how far it is on the way from the lower to the higher."""

    low: float
    high: float
    way: float


def neighbours(parts: Callable[[], Iterable[NDArray]], share: float) -> Neighbours | None:
    """Where the ``share`` quantile (linear, as numpy has it) of all parts together lies; None where there is no value.

    Such floats are ordered as their bits are, so two passes over ``parts()`` find it exactly: the first counts values
    by their upper 16 bits, the second those alike in these by the lower 16. Memory: some times 2¹⁶ counters, whatever
    N is.
    """

    def bits() -> Iterator[NDArray]:
        for values_N in parts():
            known = values_N[~np.isnan(values_N)].astype(np.float32)
            # Adding 0 turns -0 into 0.
            yield (known + np.float32(0)).view(np.uint32)

    counts = np.zeros(HALF, np.int64)
    for bits_N in bits():
        counts += np.bincount(bits_N >> 16, minlength=HALF)
    ends = np.cumsum(counts)
    if not ends[-1]:
        return None
    place = share * (ends[-1] - 1)
    ranks = np.array([np.floor(place), np.ceil(place)], np.int64)
    uppers = np.searchsorted(ends, ranks, side="right")
    lower_counts = np.zeros((2, HALF), np.int64)
    for bits_N in bits():
        for row, upper in enumerate(uppers):
            lower_counts[row] += np.bincount(bits_N[bits_N >> 16 == upper] & (HALF - 1), minlength=HALF)
    lowers = [
        np.searchsorted(np.cumsum(lower_counts[row]), rank - (ends[upper] - counts[upper]), side="right")
        for row, (upper, rank) in enumerate(zip(uppers, ranks, strict=True))
    ]
    low, high = (uppers * HALF + lowers).astype(np.uint32).view(np.float32).tolist()
    return Neighbours(low, high, float(place - ranks[0]))

"""Who is chosen when each choice costs: a ranking, with quotas that keep rare sources in and frequent ones in bounds.

Shape legend: N candidates.
"""

import math
from collections import Counter

import numpy as np
from numpy.typing import NDArray

SELECTED, EXHAUSTED, CAPPED = "selected", "budget_exhausted", "source_cap"


def choose(
    order_N: NDArray[np.intp], sources: list[str], budget: int, *, most: float = 1.0, balance: float = 0.0
) -> NDArray[np.str_]:
    """The reason of each candidate [N]: selected, or why not.

    ``order`` holds the candidates' indices, the most wanted first. No source takes more than the share ``most`` of the
    budget. ``balance`` moves each source's guaranteed places from its share of the candidates (0: none) to
    an equal share (1), as BalDistill does for long-tailed tasks; places that a source cannot fill go to the ranking.
    """
    cap = math.ceil(most * budget)
    reasons_N = np.full(len(sources), EXHAUSTED, dtype="U16")
    taken = dict.fromkeys(sources, 0)
    counts = Counter(sources) if balance else Counter()
    guaranteed = {
        source: int(budget * ((1 - balance) * count / len(sources) + balance / len(counts)))
        for source, count in counts.items()
    }
    left = budget

    def walk(limit: dict[str, int]) -> None:
        nonlocal left
        for index in order_N:
            source = sources[index]
            if left and reasons_N[index] != SELECTED and taken[source] < min(cap, limit.get(source, cap)):
                reasons_N[index] = SELECTED
                taken[source] += 1
                left -= 1

    if guaranteed:
        walk(guaranteed)
    walk({})
    for index, source in enumerate(sources):
        if left and reasons_N[index] != SELECTED and taken[source] >= cap:
            reasons_N[index] = CAPPED
    return reasons_N

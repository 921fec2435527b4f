"""Who is chosen when each choice costs: a ranking, with quotas that keep rare sources in and frequent ones in bounds.

Shape legend: N candidates, M of them, S sources.
"""

import math

import numpy as np
from numpy.typing import NDArray

# What became of a candidate, by code.
REASONS = ("selected", "budget_exhausted", "source_cap")
SELECTED, EXHAUSTED, CAPPED = range(len(REASONS))


def choose(
    order_N: NDArray[np.intp], sources_N: NDArray[np.int32], budget: int, *, most: float = 1.0, balance: float = 0.0
) -> NDArray[np.int8]:
    """What became of each candidate [N], a code of ``REASONS``.

    ``order`` holds the candidates' indices, the most wanted first, ``sources`` the number of each one's source, from 0
    on. No source takes more than the share ``most`` of the budget. ``balance`` moves each source's guaranteed places
    from its share of the candidates (0: none) to an equal share (1), as BalDistill does for long-tailed tasks; places
    that a source cannot fill go to the ranking.
    """
    counts_S = np.bincount(sources_N)
    cap = math.ceil(most * budget)
    reasons_N = np.full(len(sources_N), EXHAUSTED, dtype=np.int8)
    taken_S = np.zeros_like(counts_S)
    guaranteed_S = np.zeros_like(counts_S)
    if balance:
        shares_S = (1 - balance) * counts_S / len(sources_N) + balance * (counts_S > 0) / np.count_nonzero(counts_S)
        guaranteed_S = (budget * shares_S).astype(counts_S.dtype)
    for limit_S in (guaranteed_S, np.full_like(counts_S, cap)):
        open_M = order_N[reasons_N[order_N] != SELECTED]
        within = places(sources_N[open_M], len(counts_S)) < (np.minimum(limit_S, cap) - taken_S)[sources_N[open_M]]
        chosen = open_M[within][: budget - taken_S.sum()]
        reasons_N[chosen] = SELECTED
        taken_S += np.bincount(sources_N[chosen], minlength=len(counts_S))
    if taken_S.sum() < budget:
        reasons_N[(reasons_N != SELECTED) & (taken_S >= cap)[sources_N]] = CAPPED
    return reasons_N


def places(sources_M: NDArray[np.int32], sources: int) -> NDArray[np.intp]:
    """Each candidate's place among those of its source, from 0 on, in the order given."""
    counts_S = np.bincount(sources_M, minlength=sources)
    by_source_M = np.argsort(sources_M, kind="stable")
    places_M = np.empty(len(sources_M), dtype=np.intp)
    places_M[by_source_M] = np.arange(len(sources_M)) - np.repeat(np.cumsum(counts_S) - counts_S, counts_S)
    return places_M

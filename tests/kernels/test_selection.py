"""Choosing under a budget: the ranking decides, within quotas that hold."""

import math
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.selection import CAPPED, EXHAUSTED, SELECTED, choose


def test_without_quotas_the_ranking_decides() -> None:
    reasons = choose(np.array([3, 1, 0, 2]), np.array([0, 1, 0, 1]), 2)
    assert reasons.tolist() == [EXHAUSTED, SELECTED, EXHAUSTED, SELECTED]


def test_no_source_takes_more_than_its_share() -> None:
    reasons = choose(np.arange(6), np.array([0] * 5 + [1]), 4, most=0.5)
    assert reasons.tolist() == [SELECTED, SELECTED, CAPPED, CAPPED, CAPPED, SELECTED]


def test_balance_keeps_rare_sources_in() -> None:
    common, rare_one = 0, 1
    sources = np.array([common] * 90 + [rare_one] * 10)
    for balance, rare in ((0.0, 0), (0.5, 6), (1.0, 10)):
        reasons = choose(np.arange(100), sources, 20, balance=balance)
        assert Counter(sources[reasons == SELECTED].tolist())[rare_one] == rare


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    sources=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    budget=st.integers(1, 50),
    most=st.sampled_from([0.1, 0.4, 1.0]),
    balance=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 999),
)
def test_budget_and_caps_hold_and_nothing_is_left_over(
    sources: list[int], budget: int, most: float, balance: float, seed: int
) -> None:
    order = np.random.default_rng(seed).permutation(len(sources))
    reasons = choose(order, np.array(sources), budget, most=most, balance=balance)
    taken = Counter(np.array(sources)[reasons == SELECTED].tolist())
    cap = math.ceil(most * budget)
    assert sum(taken.values()) <= budget
    assert all(count <= cap for count in taken.values())
    room = sum(min(cap, count) for count in Counter(sources).values())
    assert sum(taken.values()) == min(budget, room)
    # Within a source the more wanted come first.
    for source in set(sources):
        chosen = [reasons[index] == SELECTED for index in order if sources[index] == source]
        assert chosen == sorted(chosen, reverse=True)

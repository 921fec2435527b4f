"""Choosing under a budget: doubt ranks prompts, and quotas hold."""

import math
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.manifest import DamagedError
from tasks.config.signals import Select
from tasks.ranking import BALANCED, CAPPED, EXHAUSTED, SELECTED, deciding_columns, draw, ranking
from tasks.schemas import SIGNAL

# One is most of them: what is guaranteed to the others displaces some of it.
SOURCES = st.sampled_from([0, 0, 0, 0, 1, 2])
DOUBTS = st.tuples(st.integers(1, 5), st.none() | st.sampled_from([0.0, 0.25, 0.5, 1.0]), SOURCES)


def candidate(name: str, unique: int = 1, assistant: float | None = None, **given: Any) -> dict[str, Any]:
    return {"prompt_id": name, "source": "s", "unique_answers": unique, "ta_student": assistant} | given


def decide(
    candidates: list[dict[str, Any]], select: Select, queries: int = 1, seed: int = 0
) -> list[tuple[float, str]]:
    """Each one's uncertainty and reason; parts of three rows."""
    schema = pa.schema([SIGNAL.field(name) for name in deciding_columns(select)])
    parts = [pa.Table.from_pylist(candidates[at : at + 3], schema) for at in range(0, len(candidates), 3)]
    with ranking(parts, schema, seed) as ranked:
        ranked.decide(select, queries)
        fates = ranked.fates(0, len(candidates))
    return list(zip(fates["uncertainty"].to_pylist(), fates["reason"].to_pylist(), strict=True))


ROWS = [
    candidate("sure", 1, 0.9, majority_share=1.0, entropy=0.0, correct=True),
    candidate("split", 2, 0.5, majority_share=0.5, entropy=1.0, correct=None),
    candidate("torn", 3, 0.1, majority_share=0.6, entropy=0.8, correct=False),
]


@pytest.mark.parametrize(
    ("select", "uncertainty"),
    [
        (Select(rule="signals"), [0, 0.5, 1]),
        (Select(rule="signals", consistency="entropy", assistant_weight=0), [0, 1, 0.5]),
        (Select(rule="signals", consistency="majority", assistant_weight=0), [0, 1, 0.5]),
        (Select(rule="signals", consistency="entropy", consistency_weight=3), [0, 0.875, 0.625]),
        (Select(rule="signals", consistency_weight=0), [0, 0.5, 1]),
        (Select(rule="oracle"), [0, 0.5, 1]),
        (Select(rule="random"), [0.5, 0.5, 0.5]),
    ],
)
def test_doubt_ranks_prompts(select: Select, uncertainty: list[float]) -> None:
    found = decide(ROWS, select)
    assert [value for value, _ in found] == pytest.approx(uncertainty)
    if select.rule != "random":
        assert [reason == SELECTED for _, reason in found] == [value == max(uncertainty) for value in uncertainty]


def test_no_weight_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="both 0"):
        Select(rule="signals", consistency_weight=0, assistant_weight=0)


def test_one_candidate_and_equal_ones_are_neither_certain_nor_uncertain() -> None:
    assert decide([], Select(rule="signals", balance=0.5)) == []
    assert decide([candidate("a")], Select(rule="signals")) == [(0.5, SELECTED)]
    assert [value for value, _ in decide([candidate(name) for name in "abcde"], Select(rule="signals"))] == [0.5] * 5


def test_a_damaged_part_is_said_as_what_it_is() -> None:
    """The stage forgets a damaged part by this error, and makes it anew."""
    schema = pa.schema([SIGNAL.field(name) for name in deciding_columns(Select(rule="signals"))])

    def parts() -> Iterator[pa.Table]:
        yield schema.empty_table()
        raise DamagedError("here", "stages/x", "is missing")

    with pytest.raises(DamagedError, match="is missing"), ranking(parts(), schema, 0):
        pass


def test_no_source_takes_more_than_its_share() -> None:
    wanted = [candidate(str(n), 9 - n, source="common" if n < 5 else "rare") for n in range(6)]
    found = decide(wanted, Select(rule="signals", source_share=0.5, assistant_weight=0), 4)
    assert [reason for _, reason in found] == [SELECTED, SELECTED, CAPPED, CAPPED, CAPPED, SELECTED]


@pytest.mark.parametrize(("balance", "rare"), [(0.0, 0), (0.5, 6), (1.0, 10)])
def test_balance_keeps_rare_sources_in(balance: float, rare: int) -> None:
    wanted = [candidate(str(n), 200 - n, source="common" if n < 90 else "rare") for n in range(100)]
    found = decide(wanted, Select(rule="signals", balance=balance, assistant_weight=0), 20)
    assert sum(reason == SELECTED for _, reason in found[90:]) == rare
    # The ranking alone would take the first twenty, and those that had to go stand at its end.
    assert [reason for _, reason in found[:20]] == [SELECTED] * (20 - rare) + [BALANCED] * rare
    assert {reason for _, reason in found[20:]} <= {SELECTED, EXHAUSTED}


def test_each_row_has_its_own_reason() -> None:
    """Two places a source at most, of four, and one guaranteed to each."""
    wanted = [
        ("common", SELECTED),
        ("common", SELECTED),
        ("common", CAPPED),
        ("common", CAPPED),
        ("other", SELECTED),
        ("other", BALANCED),  # its query went to the rare one
        ("other", EXHAUSTED),
        ("common", EXHAUSTED),  # its source is full, but no query was left either
        ("rare", SELECTED),
        ("rare", EXHAUSTED),
    ]
    candidates = [candidate(str(n), 20 - n, source=source) for n, (source, _) in enumerate(wanted)]
    found = decide(candidates, Select(rule="signals", source_share=0.5, balance=1.0, assistant_weight=0), 4)
    assert [reason for _, reason in found] == [reason for _, reason in wanted]


def walked(order: list[int], sources: list[str], cap: int, queries: int, guaranteed: dict[str, int]) -> dict[int, str]:
    """Fates by going through the ranking one by one: once without guarantees, then with them."""
    plain, taken = {}, Counter[str]()
    for n in order:
        if taken.total() == queries:
            plain[n] = EXHAUSTED
        else:
            plain[n] = CAPPED if taken[sources[n]] == cap else BALANCED
            taken[sources[n]] += plain[n] == BALANCED
    chosen, taken = set[int](), Counter[str]()
    for quotas, most in ((guaranteed, math.inf), (dict.fromkeys(sources, cap), queries)):
        for n in order:
            if n not in chosen and len(chosen) < most and taken[sources[n]] < quotas[sources[n]]:
                chosen.add(n)
                taken[sources[n]] += 1
    return {n: SELECTED if n in chosen else plain[n] for n in order}


def share(values: list[float]) -> list[Fraction]:
    """Ranks counted one by one."""
    if len(values) == 1:
        return [Fraction(1, 2)]
    return [
        (sum(other < value for other in values) + Fraction(sum(other == value for other in values) - 1, 2))
        / (len(values) - 1)
        for value in values
    ]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    doubts=st.lists(DOUBTS, min_size=20, max_size=40) | st.lists(DOUBTS, min_size=1, max_size=12),
    queries=st.integers(4, 12) | st.integers(1, 50),
    most=st.sampled_from([1.0, 0.4, 0.1]),
    balance=st.sampled_from([1.0, 0.3, 0.0]),
    weights=st.sampled_from([(1.0, 1.0), (3.0, 1.0), (0.0, 1.0)]),
    seed=st.integers(0, 999),
)
def test_ranks_are_those_counted_budget_and_caps_hold_and_reasons_are_those_of_a_walk(
    doubts: list[tuple[int, float | None, int]],
    queries: int,
    most: float,
    balance: float,
    weights: tuple[float, float],
    seed: int,
) -> None:
    candidates = [candidate(str(n), unique, ta, source=str(s)) for n, (unique, ta, s) in enumerate(doubts)]
    select = Select(
        rule="signals", source_share=most, balance=balance, consistency_weight=weights[0], assistant_weight=weights[1]
    )
    found = decide(candidates, select, queries, seed)
    unique_shares = share([unique for unique, _, _ in doubts])
    ta_shares = share([0.0 if ta is None else 1 - ta for _, ta, _ in doubts])
    expected = [
        float((Fraction(weights[0]) * a + Fraction(weights[1]) * b) / Fraction(sum(weights)))
        for a, b in zip(unique_shares, ta_shares, strict=True)
    ]
    assert [value for value, _ in found] == pytest.approx(expected, abs=1e-12)

    sources = [row["source"] for row in candidates]
    taken = Counter(source for source, (_, reason) in zip(sources, found, strict=True) if reason == SELECTED)
    cap = math.ceil(most * queries)
    assert sum(taken.values()) == min(queries, sum(min(cap, count) for count in Counter(sources).values()))
    assert all(count <= cap for count in taken.values())
    # Within a source the more wanted come first; draws decide between equals.
    order = sorted(range(len(found)), key=lambda n: (-found[n][0], draw(seed, str(n))))
    for source in set(sources):
        chosen = [found[n][1] == SELECTED for n in order if sources[n] == source]
        assert chosen == sorted(chosen, reverse=True)
    sizes = Counter(sources)
    places = {
        source: math.trunc(queries * ((1 - balance) * size / len(sources) + balance / len(sizes)))
        for source, size in sizes.items()
    }
    guaranteed = {source: min(cap, count) if balance else 0 for source, count in places.items()}
    fates = walked(order, sources, cap, queries, guaranteed)
    assert [reason for _, reason in found] == [fates[n] for n in range(len(found))]

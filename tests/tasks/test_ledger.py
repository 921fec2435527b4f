"""The ledger: neither account is exceeded, whatever engines bill, and whenever processes die."""

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.store import LocalStore
from tasks.config.budget import Price
from tasks.ledger import NOTHING, Amount, BudgetExhausted, Caps, Ledger, Reservation, SpendingExhausted, together

PRICE = Price(input=0.15, output=0.6)


class MemoryStore(LocalStore):
    """What the ledger needs of a store, without a disk."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def read(self, path: str) -> bytes:
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path]

    def create(self, path: str, data: bytes) -> bool:
        return self.objects.setdefault(path, data) is data


def ledger(store: LocalStore, queries: int = 100, tokens: int | None = None, factor: float = 2.0) -> Ledger:
    caps = Caps(queries=queries, tokens=tokens)
    return Ledger(store, "stages/annotate/0", caps, factor, caps)


def prompts(count: int, prompt: int = 10, response: int = 20) -> dict[int, Amount]:
    return {number: Amount(1, prompt, response) for number in range(count)}


def test_a_price_is_exact() -> None:
    assert PRICE.of(1000, 1000) == Fraction(3, 4)
    caps = Caps(queries=10, money=0.3, price=Price(input=0.1, output=0))
    # Three times 0.1 is above 0.3 in floats.
    assert caps.cover(Amount(3, 3000, 0))
    assert not caps.cover(Amount(3, 3001, 0))


def test_what_was_not_used_is_given_back() -> None:
    book = ledger(MemoryStore(), tokens=100)
    first = book.reserve(0, prompts(3))
    assert first is not None
    assert (book.charged.tokens, book.spent.tokens) == (90, 90)
    assert book.reserve(1, prompts(1)) is None, "what is under way may return some"
    book.settle(first, {number: Amount(1, 10, 2) for number in range(3)})
    assert (book.charged.tokens, book.spent.tokens) == (36, 36)
    book.close(0, Amount(3, 30, 6))
    assert book.reserve(1, prompts(5)) is not None or book.under_way


def test_only_the_queries_that_fit_are_taken() -> None:
    book = ledger(MemoryStore(), tokens=70)
    taken = book.reserve(0, prompts(5))
    assert taken is not None
    assert list(taken.worst) == [0, 1]
    book.settle(taken, taken.worst)
    with pytest.raises(BudgetExhausted):
        book.reserve(0, {2: Amount(1, 10, 20)})


def test_a_lost_request_is_spent_and_asked_again_without_another_charge() -> None:
    store = MemoryStore()
    book = ledger(store, queries=2, factor=1.5)
    lost = book.reserve(0, prompts(2))
    assert lost is not None
    book.lose(lost)
    again = ledger(store, queries=2, factor=1.5).reserve(0, prompts(1))
    assert again is not None
    book = ledger(store, queries=2, factor=1.5)
    assert (book.charged.queries, book.spent.queries) == (2, 3)
    with pytest.raises(SpendingExhausted, match=r"^budget\.spending_factor: 1\.5 times"):
        book.reserve(0, prompts(2))


def test_a_bill_above_the_worst_case_is_refused() -> None:
    book = ledger(MemoryStore())
    asked = book.reserve(0, prompts(1))
    assert asked is not None
    with pytest.raises(ValueError, match="template_tokens"):
        book.settle(asked, {0: Amount(1, 11, 20)})
    # It was billed all the same.
    assert (book.charged.tokens, book.spent.tokens, book.under_way) == (31, 31, False)


def test_spare_tries_are_reserved_only_where_spending_covers_them() -> None:
    book = ledger(MemoryStore(), queries=4, factor=1.5)
    asked = book.reserve(0, prompts(2), spare=3)
    assert asked is not None
    assert asked.spare == 3
    # Two are asked; what may be asked again is not yet.
    assert (book.spent.queries, book.spare.queries) == (5, 3)
    book.settle(asked, asked.worst, asked.largest * 2)
    assert (book.spent.queries, book.spare.queries) == (4, 0)
    more = book.reserve(1, prompts(2), spare=1)
    assert more is not None
    assert more.spare == 0


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_neither_account_is_exceeded_whatever_dies(data: st.DataObject) -> None:
    """Two processes run one stage at once; engines and processes die at any moment, answers are of any length up to
    their limit. The bill is kept apart: what engines really wrote, and what stands committed."""
    caps = Caps(
        queries=data.draw(st.integers(1, 14)),
        tokens=data.draw(st.none() | st.integers(30, 400)),
        money=data.draw(st.none() | st.floats(0.01, 0.1)),
        price=PRICE,
    )
    factor = data.draw(st.sampled_from([1.0, 1.3, 2.0]))
    store, shards = MemoryStore(), 4
    committed: dict[int, Amount] = {}
    billed = NOTHING

    def opened() -> Ledger:
        return Ledger(store, "stages/annotate/0", caps, factor, caps, committed=dict(committed))

    books = [opened(), opened()]
    open_calls: list[list[Reservation]] = [[], []]
    answers: list[dict[int, dict[int, Amount]]] = [{}, {}]
    worst = {number: Amount(1, data.draw(st.integers(1, 12)), 20) for number in range(4)}
    for _ in range(data.draw(st.integers(1, 40))):
        who = data.draw(st.integers(0, 1))
        deed = data.draw(st.sampled_from(["ask", "ask", "answer", "answer", "lose", "die", "commit"]))
        book = books[who]
        if deed == "ask":
            shard = data.draw(st.integers(0, shards - 1))
            left = {n: a for n, a in worst.items() if n not in answers[who].get(shard, {})}
            asked_here = {n for call in open_calls[who] if call.shard == shard for n in call.worst}
            left = {n: a for n, a in left.items() if n not in asked_here}
            if shard in committed or not left:
                continue
            try:
                made = book.reserve(shard, left, spare=data.draw(st.integers(0, 2)))
            except (BudgetExhausted, SpendingExhausted):
                continue
            if made:
                open_calls[who].append(made)
        elif deed in ("answer", "lose") and open_calls[who]:
            call = open_calls[who].pop(data.draw(st.integers(0, len(open_calls[who]) - 1)))
            used = {n: Amount(1, a.prompt_tokens, data.draw(st.integers(0, 20))) for n, a in call.worst.items()}
            lost = call.largest * data.draw(st.integers(0, call.spare))
            billed += together(used.values()) + lost
            if deed == "lose":
                book.lose(call)
            else:
                book.settle(call, used, lost)
                answers[who].setdefault(call.shard, {}).update(used)
        elif deed == "die":
            # What was under way had been written and billed, unheard.
            for call in open_calls[who]:
                billed += together(call.worst.values()) + call.largest * call.spare
            open_calls[who], answers[who], books[who] = [], {}, opened()
        elif deed == "commit":
            for shard, found in answers[who].items():
                whole = not any(call.shard == shard for call in open_calls[who])
                if whole and shard not in committed:
                    committed[shard] = together(found.values())
                if whole:
                    book.close(shard, committed[shard])
        charged = together(committed.values())
        assert caps.cover(charged), (charged, caps)
        assert caps.cover(billed, factor), (billed, caps, factor)
        assert billed.within(opened().spent)


def test_what_is_committed_is_not_held_in_memory() -> None:
    store, count = MemoryStore(), 50
    book = ledger(store, queries=10 * count)
    for shard in range(10):
        asked = book.reserve(shard, prompts(count))
        assert asked is not None
        if shard < 9:
            book.settle(asked, asked.worst)
            book.close(shard, together(asked.worst.values()))
    again = Ledger(
        store, book.folder, book.caps, 2.0, book.caps, committed={n: Amount(50, 500, 1000) for n in range(9)}
    )
    for each in (book, again):
        assert (each.charged, each.spent) == (Amount(500, 5000, 10000),) * 2
        assert sum(len(entry.held) for entry in each._entries.values()) == count  # of the open shard alone


def test_the_log_lies_in_the_store(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    book = ledger(store)
    asked = book.reserve(0, prompts(2))
    assert asked is not None
    book.settle(asked, asked.worst)
    assert [path.name for path in sorted((tmp_path / "stages/annotate/0/spending").iterdir())] == [
        "00000000.json",
        "00000001.json",
    ]
    assert ledger(store).spent == book.spent


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"settle": "unknown", "queries": {}, "extra": [0, 0, 0]}',
        b'{"reserve": "a", "shard": 0, "queries": {"0": [1, -500, 0]}, "extra": [0, 0, 0]}',
        b'{"reserve": "a", "shard": 0, "queries": {"0": [1]}, "extra": ["x", 0, 0]}',
    ],
)
def test_a_damaged_entry_is_refused(tmp_path: Path, data: bytes) -> None:
    store = LocalStore(tmp_path)
    assert ledger(store).reserve(0, prompts(2))
    store.write("stages/annotate/0/spending/00000000.json", data)
    with pytest.raises(ValueError, match=r"00000000\.json is damaged, so what was spent is not known") as error:
        ledger(store)
    assert "\n" not in str(error.value)

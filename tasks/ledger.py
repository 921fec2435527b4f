"""The ledger: nothing is sent to the teacher that budget and cap on spending do not cover at its worst.

Two accounts, method.md section 3. *Charged*: each query once, by the answer that was committed. *Spent*: everything
that was sent, also what an engine's death or a lost reply makes be sent again. A request's worst case is reserved on
both before it is sent; afterwards what it did not use is given back. A request that nobody heard of again stays spent
at its worst.

The state is a log in the stage's folder, ``spending/00000000.json`` and so on, each entry created exclusively. Who
finds a number taken reads that entry and decides anew, so neither account is exceeded by processes that die at any
moment, nor by two that run one stage at once.
"""

import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass, field
from fractions import Fraction
from typing import Any

from infra.store import Store
from tasks.config.base import Config
from tasks.config.budget import Budget, Price


@dataclass(frozen=True, slots=True)
class Amount:
    """So many queries with so many tokens, prompts and responses apart."""

    queries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    # Written out: made for every query several times, these were half of what annotating takes beside engines.
    def __add__(self, other: "Amount") -> "Amount":
        return Amount(
            self.queries + other.queries,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )

    def __sub__(self, other: "Amount") -> "Amount":
        return self + other * -1

    def __mul__(self, count: int) -> "Amount":
        return Amount(self.queries * count, self.prompt_tokens * count, self.completion_tokens * count)

    def within(self, other: "Amount") -> bool:
        """Whether no part exceeds the other's."""
        return all(own <= most for own, most in zip(self.parts, other.parts, strict=True))

    @property
    def parts(self) -> tuple[int, int, int]:
        """Queries, prompt tokens, completion tokens."""
        return self.queries, self.prompt_tokens, self.completion_tokens

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


NOTHING = Amount()


def largest(amounts: Iterable[Amount]) -> Amount:
    """Part by part; nothing of nothing."""
    return Amount(*map(max, zip(*(amount.parts for amount in [NOTHING, *amounts]), strict=True)))


def read(parts: list[int]) -> Amount:
    """An amount of the log. ValueError for one below nothing, which would give budget back."""
    made = Amount(*parts)
    if not all(isinstance(value, int) and value >= 0 for value in made.parts):
        raise ValueError(f"{parts} is no amount")
    return made


def together(amounts: Iterable[Amount]) -> Amount:
    return sum(amounts, NOTHING)


class Caps(Config):
    """What an account may come to; None: not capped."""

    queries: int
    """Queries."""
    tokens: int | None = None
    """Tokens, prompts and responses."""
    money: float | None = None
    """By ``price``."""
    price: Price | None = None
    """The model's."""

    def cover(self, amount: Amount, factor: float = 1.0) -> bool:
        """Whether an account of ``factor`` times these caps may come to this amount."""
        times = Fraction(str(factor))
        if amount.queries > self.queries * times or (self.tokens is not None and amount.tokens > self.tokens * times):
            return False
        return self.money is None or self.cost(amount) <= Fraction(str(self.money)) * times

    def cost(self, amount: Amount) -> Fraction:
        """In the currency of the price; 0 without one."""
        return self.price.of(amount.prompt_tokens, amount.completion_tokens) if self.price else Fraction(0)


class BudgetExhausted(Exception):
    """The budget does not cover one query more."""


class SpendingExhausted(ValueError):
    """The cap on spending does not cover one query more. For the user: one line with the fix."""


def caps_of(budget: Budget, share: float = 1.0) -> Caps:
    """The budget's caps, or a share of them. A price that decides nothing is left out: changing it redoes nothing."""
    tokens = None if budget.tokens is None else int(budget.tokens * share)
    money = None if budget.money is None else budget.money * share
    price = budget.price if budget.money is not None else None
    return Caps(queries=int(budget.queries * share), tokens=tokens, money=money, price=price)


def caps_between(budget: Budget, start: float, end: float, parts: list[float]) -> list[Caps]:
    """Caps of the teachers that annotate in turn between two shares of the budget. ``parts``: their cumulative parts of
    tokens and money; what one leaves goes to the next. Queries are shared out by prompts."""
    whole = caps_of(budget, end)
    return [
        caps_of(budget, start + (end - start) * part).model_copy(update={"queries": whole.queries}) for part in parts
    ]


@dataclass(frozen=True)
class Reservation:
    """What may be sent: queries by number, each with its worst case, and so much more for repeated tries."""

    id: str
    shard: int
    worst: Mapping[int, Amount]
    spare: int

    @property
    def largest(self) -> Amount:
        """The worst case of one of them, which each spare try is reserved at."""
        return largest(self.worst.values())


@dataclass
class _Entry:
    """A reservation as the log tells it: its worst case until it is settled, then what it used. ``held``: by query,
    until the shard is committed; ``total``: with all further tries."""

    shard: int
    held: dict[int, Amount]
    total: Amount


@dataclass
class Ledger:
    """Both accounts of one stage. ``charged_before`` and ``spent_before``: by earlier stages of the run. ``committed``:
    what each shard is charged that an earlier attempt has committed; in memory are the queries of the others only."""

    store: Store
    folder: str
    caps: Caps
    spending_factor: float
    spending_caps: Caps
    charged_before: Amount = NOTHING
    spent_before: Amount = NOTHING
    committed: InitVar[Mapping[int, Amount] | None] = None
    spent: Amount = field(default=NOTHING, init=False)
    charged: Amount = field(default=NOTHING, init=False)

    def __post_init__(self, committed: Mapping[int, Amount] | None) -> None:
        self._number = 0
        self._entries: dict[str, _Entry] = {}
        self._tries: dict[int, list[_Entry]] = {}  # by shard
        self._charges: dict[tuple[int, int], Amount] = {}  # by query, of shards that are not committed
        self._closed: dict[int, Amount] = {}
        self._under_way: dict[str, Amount] = {}  # by reservation, its spare tries
        for shard, charged in (committed or {}).items():
            self.close(shard, charged)
        self._read()

    @property
    def under_way(self) -> bool:
        """Whether something was sent from here that may yet give back a part of its reservation."""
        return bool(self._under_way)

    @property
    def spare(self) -> Amount:
        """What is reserved for further tries of requests that are under way from here."""
        return together(self._under_way.values())

    def reserve(
        self, shard: int, worst: Mapping[int, Amount], spare: int = 0, *, whole: bool = False
    ) -> Reservation | None:
        """Reserve as many of these queries, from the first on, as both accounts cover, with ``spare`` further tries
        where spending covers these too. None: not all fit, but what is under way may give some back. BudgetExhausted or
        SpendingExhausted: not one fits (``whole``: not all), and nothing is under way."""
        while True:
            taken, blocked = self._fitting(shard, worst)
            if len(taken) < len(worst) and self.under_way:
                return None
            if not taken or (whole and len(taken) < len(worst)):
                raise blocked
            reservation = Reservation(uuid.uuid4().hex, shard, taken, spare)
            extra = reservation.largest * spare
            if not self._covers_spending(together(taken.values()) + extra):
                reservation, extra = Reservation(reservation.id, shard, taken, 0), NOTHING
            queries = {number: amount.parts for number, amount in taken.items()}
            entry = {"reserve": reservation.id, "shard": shard, "queries": queries, "extra": extra.parts}
            if self._append(entry):
                self._under_way[reservation.id] = extra
                return reservation

    def settle(self, reservation: Reservation, used: Mapping[int, Amount], lost: Amount = NOTHING) -> None:
        """Give back what was not used. ``used``: by query, of the answer; ``lost``: by tries that may have been billed
        without one. ValueError where that is more than was reserved; it is on the account all the same."""
        queries = {number: amount.parts for number, amount in used.items()}
        entry = {"settle": reservation.id, "queries": queries, "extra": lost.parts}
        while not self._append(entry):
            pass
        self._under_way.pop(reservation.id, None)
        over = [number for number, amount in used.items() if not amount.within(reservation.worst[number])]
        if over or not lost.within(reservation.largest * reservation.spare):
            bill, most = (used[over[0]], reservation.worst[over[0]]) if over else (lost, reservation.largest)
            raise ValueError(
                f"budget: the teacher billed {bill.prompt_tokens} + {bill.completion_tokens} tokens where at most "
                f"{most.prompt_tokens} + {most.completion_tokens} were expected: raise prompts.max_prompt_tokens, or "
                "for an endpoint models.teacher.service.template_tokens"
            )

    def lose(self, reservation: Reservation) -> None:
        """Nobody will tell what it used: it stays at its worst."""
        self._under_way.pop(reservation.id, None)

    def close(self, shard: int, charged: Amount) -> None:
        """The shard is committed: this is what its queries are charged, whatever was reserved for them."""
        for key in [key for key in self._charges if key[0] == shard]:
            self.charged -= self._charges.pop(key)
        for entry in self._tries.pop(shard, []):
            entry.held = {}
        self.charged += charged - self._closed.get(shard, NOTHING)
        self._closed[shard] = charged

    def _covers_spending(self, more: Amount) -> bool:
        return self.spending_caps.cover(self.spent_before + self.spent + more, self.spending_factor)

    def _fitting(self, shard: int, worst: Mapping[int, Amount]) -> tuple[dict[int, Amount], Exception]:
        """The first queries that both accounts cover, and what stands in the way of one more."""
        taken: dict[int, Amount] = {}
        charges, sent = self.charged_before + self.charged, NOTHING
        for number, amount in worst.items():
            known = self._charges.get((shard, number), NOTHING)
            charges, sent = charges + largest([known, amount]) - known, sent + amount
            if not self.caps.cover(charges):
                return taken, BudgetExhausted()
            if not self._covers_spending(sent):
                return taken, SpendingExhausted(
                    f"budget.spending_factor: {self.spending_factor:g} times the budget does not cover what had to be "
                    "sent again: raise it and run the same command, which goes on from here"
                )
            taken[number] = amount
        return taken, BudgetExhausted()

    def _path(self, number: int) -> str:
        return f"{self.folder}/spending/{number:08d}.json"

    def _append(self, entry: dict[str, Any]) -> bool:
        """Write the next entry. False: another process has written one; it is read, and the caller decides anew."""
        if self.store.create(self._path(self._number), json.dumps(entry).encode()):
            # Read back as others will.
            self._apply(json.loads(json.dumps(entry)))
            return True
        self._read()
        return False

    def _read(self) -> None:
        """Entries that are new here."""
        while True:
            try:
                data = self.store.read(self._path(self._number))
            except FileNotFoundError:
                return
            try:
                self._apply(json.loads(data))
            except (ValueError, LookupError, TypeError, AttributeError):
                raise ValueError(
                    f"budget: {self.store.location(self._path(self._number))} is damaged, so what was spent is not "
                    "known: restore it, or do the stage again with --from, which opens new accounts"
                ) from None

    def _apply(self, entry: dict[str, Any]) -> None:
        queries = {int(number): read(amount) for number, amount in entry["queries"].items()}
        total = together(queries.values()) + read(entry["extra"])
        if "reserve" in entry:
            made = _Entry(entry["shard"], {}, NOTHING)
            self._entries[entry["reserve"]] = made
            if made.shard not in self._closed:
                made.held = queries
                self._tries.setdefault(made.shard, []).append(made)
        else:
            made = self._entries[entry["settle"]]
            made.held = {number: queries.get(number, NOTHING) for number in made.held}
        self.spent += total - made.total
        made.total = total
        for number in made.held:
            self._charge(made.shard, number)
        self._number += 1

    def _charge(self, shard: int, number: int) -> None:
        """A query is charged once: the most that any try of it may come to, until its shard is committed."""
        tries = (entry.held[number] for entry in self._tries[shard] if number in entry.held)
        before, now = self._charges.get((shard, number), NOTHING), largest(tries)
        self._charges[shard, number] = now
        self.charged += now - before

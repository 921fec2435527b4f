"""Asking: a table's prompts on their way through engines, shard by shard, and through the ledger where there is one.

Without a ledger a shard is one call. With one, a call carries the prompts that budget and spending cover at their
worst; what is left of the shard follows when earlier answers have given back what they did not use, and stays unasked,
with its reason, when nothing more will come back. Prompts are taken in their order, so the same ones are asked however
fast engines answer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tasks.calls import Call
from tasks.config.peers import FIRST
from tasks.ledger import Amount, BudgetExhausted, Reservation
from tasks.purse import Purse

ANSWERED, UNANSWERED, EXHAUSTED = "answered", "no_answer", "budget_exhausted"


@dataclass
class Shard:
    """One shard: prompts not asked yet, answers that came, and why some never will."""

    number: int
    prompts: list[dict[str, Any]]
    left: list[int] = field(init=False)
    calls: int = 0  # under way
    answers: list[pa.Table] = field(default_factory=list)
    used: dict[int, Amount] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.left = list(range(len(self.prompts)))


@dataclass
class Wave:
    """The prompts of one call. ``reservations``: what the ledger set aside for its tries that may still be answered."""

    shard: Shard
    numbers: list[int]
    reservations: list[Reservation] = field(default_factory=list)


class Asking:
    """Calls for a pool of engines, and what becomes of their answers. ``call(prompts, spare)`` makes an engine's call;
    ``commit(shard)`` is told of each shard that is whole."""

    def __init__(
        self,
        shards: Iterator[Shard],
        call: Callable[[list[dict[str, Any]], int], Call],
        commit: Callable[[Shard], None],
        purse: Purse | None = None,
    ) -> None:
        self.shards, self.call, self.commit, self.purse = shards, call, commit, purse

    def calls(self) -> Iterator[tuple[Wave, Call] | None]:
        """Calls with what they ask; None where the next has to wait for the result of another."""
        for shard in self.shards:
            while shard.left:
                wave = Wave(shard, list(shard.left))
                try:
                    if not self._reserve(wave):
                        yield None
                        continue
                except BudgetExhausted:
                    # Nothing is under way, so the shard has all the answers it will get.
                    shard.reasons.update(dict.fromkeys(shard.left, EXHAUSTED))
                    shard.left = []
                    self.commit(shard)
                    break
                asked = set(wave.numbers)
                shard.left = [number for number in shard.left if number not in asked]
                shard.calls += 1
                yield wave, self._call(wave, wave.numbers)

    def lost(self, wave: Wave, start: int = 0, end: int | None = None) -> None:
        """An engine died with what it was asked of a wave, or of its prompts ``start`` to ``end``: it stays spent at
        its worst. Told at once: what others may still give back has to be known."""
        numbers = set(wave.numbers[start:end])
        for reservation in [known for known in wave.reservations if known.worst.keys() & numbers]:
            assert self.purse
            self.purse.ledger.lose(reservation)
            wave.reservations.remove(reservation)

    def again(self, wave: Wave, start: int = 0, end: int | None = None) -> Call | None:
        """The call once more, for one that was lost, or its prompts from ``start`` to ``end``. None: it has to wait for
        the result of another. SpendingExhausted: it never may be made."""
        numbers = wave.numbers[start:end]
        if self.purse:
            worst = self._worst(wave, numbers)
            made = self.purse.ledger.reserve(wave.shard.number, worst, self.purse.spare(len(worst)), whole=True)
            if made is None:
                return None
            wave.reservations.append(made)
        return self._call(wave, numbers)

    def take(self, wave: Wave, answers: pa.Table) -> None:
        """An engine's answers to a wave. ``conversation`` in them becomes the prompt's number in its shard."""
        shard, place = wave.shard, answers.column_names.index("conversation")
        numbers = pa.array(wave.numbers, pa.int32()).take(answers["conversation"].combine_chunks())
        answers = answers.set_column(place, "conversation", numbers)
        if self.purse:
            used, reasons, _ = bill(answers)
            shard.used |= used
            shard.reasons |= reasons
        for reservation in wave.reservations:
            assert self.purse
            own, _, lost = bill(answers.filter(pc.is_in(numbers, pa.array(reservation.worst, pa.int32()))))
            self.purse.ledger.settle(reservation, own, reservation.largest * lost)
        shard.answers.append(answers)
        shard.calls -= 1
        check_outage(answers, self.purse.stage.settings.role if self.purse else FIRST)
        if not shard.left and not shard.calls:
            self.commit(shard)

    def _worst(self, wave: Wave, numbers: list[int]) -> dict[int, Amount]:
        assert self.purse
        return {number: self.purse.worst(wave.shard.prompts[number]) for number in numbers}

    def _reserve(self, wave: Wave) -> bool:
        """Whether the wave may be sent now, cut to what may. BudgetExhausted or SpendingExhausted: it never may."""
        if self.purse is None:
            return True
        worst = self._worst(wave, wave.numbers)
        made = self.purse.ledger.reserve(wave.shard.number, worst, self.purse.spare(len(worst)))
        if made is not None:
            wave.numbers, wave.reservations = list(made.worst), [made]
        return made is not None

    def _call(self, wave: Wave, numbers: list[int]) -> Call:
        prompts = [wave.shard.prompts[number] for number in numbers]
        return self.call(prompts, wave.reservations[-1].spare if wave.reservations else 0)


def check_outage(answers: pa.Table, teacher: str) -> None:
    """ValueError where a teacher's endpoint left more than half of a call's requests without an answer, and not for
    their own faults. What the others were answered is lost: the next run asks again."""
    if "outage" in answers.column_names and 2 * pc.sum(answers["outage"]).as_py() > answers.num_rows:
        errors = answers["error"].filter(answers["outage"]).to_pylist()
        place = "models.teacher" if teacher == FIRST else f"peers.teachers, {teacher}"
        raise ValueError(f"{place}: {max(set(errors), key=errors.count)}; {len(errors)} requests had no answer")


def bill(answers: pa.Table) -> tuple[dict[int, Amount], dict[int, str], int]:
    """By prompt: what its answers take, and whether they came; and how many tries were lost that may be billed. An
    endpoint says what it bills; an engine of our own takes what it reads and writes."""
    if "lost" in answers.column_names:
        read, written, lost = (
            answers["prompt_tokens"],
            answers["completion_tokens"],
            pc.sum(answers["lost"]).as_py() or 0,
        )
    else:
        read, written = (pc.list_value_length(answers[name]) for name in ("prompt_token_ids", "token_ids"))
        lost = 0
    # A request that its engine dies of has neither.
    read, written = pc.fill_null(read, 0), pc.fill_null(written, 0)
    used: dict[int, Amount] = {}
    reasons: dict[int, str] = {}
    columns = (answers["conversation"], read, written, pc.is_valid(answers["text"]))
    for number, *tokens, answered in zip(*(column.to_pylist() for column in columns), strict=True):
        used[number] = used.get(number, Amount()) + Amount(1, *tokens)
        reasons[number] = ANSWERED if answered and reasons.get(number, ANSWERED) == ANSWERED else UNANSWERED
    return used, reasons, lost

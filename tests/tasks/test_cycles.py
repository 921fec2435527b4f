"""The cycles: nothing is lost between writers, and a month's queries count what is set aside."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from infra.store import Store
from tasks.cycles import Cycle, Cycles, change, read_cycles, update
from tasks.inbox import InboxFile


def day(month: int, number: int = 1) -> datetime:
    return datetime(2026, month, number, tzinfo=UTC)


def cycle(number: int, month: int = 11, queries: int = 10, **fields) -> Cycle:
    return Cycle(number=number, opened=day(month), queries=queries, **fields)


def file(name: str) -> InboxFile:
    return InboxFile(path=name, stamp="1", content=name)


def test_a_month_counts_what_was_charged_and_what_is_set_aside():
    cycles = Cycles(cycles=[cycle(1, 10), cycle(2, state="done", queries=7), cycle(3)])
    assert (cycles.charged("2026-10"), cycles.charged("2026-11"), cycles.charged("2026-12")) == (10, 17, 0)


def test_files_of_a_run_that_goes_on_are_not_taken_yet():
    cycles = Cycles(
        cycles=[cycle(1, state="done", files={0: [file("a")], 2: [file("b")]}), cycle(2, files={0: [file("c")]})]
    )
    assert [found.path for found in cycles.taken] == ["a", "b"]


def test_it_is_kept_in_the_store(store: Store):
    assert read_cycles(store, "weekly") == (Cycles(), None)
    opened = change(store, "weekly", lambda cycles: cycle(1, files={0: [file("a")]}))
    assert read_cycles(store, "weekly")[0].cycles == [opened]
    done = update(store, "weekly", 1, state="done", prompts="p", kept=["k"], queries=4)
    assert (done.files, done.queries, done.state) == (opened.files, 4, "done")
    change(store, "weekly", lambda cycles: cycle(2, state="waited", queries=0))
    change(store, "weekly", lambda cycles: cycle(3, queries=5))
    cycles, _ = read_cycles(store, "weekly")
    assert [known.queries for known in cycles.cycles] == [4, 0, 5]
    assert cycles.done == [done]


def test_of_many_that_open_at_once_none_is_lost(store: Store):
    def follow(cycles: Cycles) -> Cycle:
        return cycle(len(cycles.cycles) + 1, queries=2)

    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: change(store, "weekly", follow), range(8)))
    assert sorted(found.number for found in opened) == list(range(1, 9))
    assert read_cycles(store, "weekly")[0].charged("2026-11") == 16

"""The cycles of runs that follow each other: which prompts each took, what it may ask of the teacher, what it kept.

``recurring/<name>.json`` holds all cycles of a pipeline, and changes by ``swap`` only. A cycle is opened with its files
and its queries set aside in one change, so no two runs take the same file, and a month's queries are never exceeded. It
stays open until its run has ended well: a run that was killed or cancelled is continued by the next one, with the same
files and queries. Its prompts count as taken once the prompts stage is complete.
"""

from collections.abc import Callable
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, Field

from infra.manifest import parsed, sealed
from infra.store import Store, StorePath
from tasks.inbox import InboxFile


class Cycle(BaseModel):
    """One run, and its continuations."""

    number: int
    opened: datetime
    files: dict[int, list[InboxFile]] = Field(default_factory=dict)  # by position of the inbox among the sources
    queries: int  # set aside for it, then what it was charged
    state: Literal["open", "done", "waited"] = "open"  # waited: too few prompts, nothing was taken
    prompts: StorePath | None = None  # manifest of the prompts stage: from then on its prompts are taken
    kept: list[StorePath] = Field(default_factory=list)  # manifests of the rows it kept
    run: str = ""

    @property
    def month(self) -> str:
        return f"{self.opened:%Y-%m}"

    @property
    def all_files(self) -> list[InboxFile]:
        return [file for files in self.files.values() for file in files]


class Cycles(BaseModel):
    """All cycles, in order."""

    format: Literal[1] = 1
    cycles: list[Cycle] = Field(default_factory=list)

    @property
    def last(self) -> Cycle | None:
        return self.cycles[-1] if self.cycles else None

    @property
    def done(self) -> list[Cycle]:
        return [cycle for cycle in self.cycles if cycle.state == "done"]

    @property
    def taken(self) -> list[InboxFile]:
        return [file for cycle in self.done for file in cycle.all_files]

    def charged(self, month: str) -> int:
        """Queries of a month, those set aside by a run that goes on included."""
        return sum(cycle.queries for cycle in self.cycles if cycle.month == month)

    def with_last(self, cycle: Cycle) -> "Cycles":
        """All of them, this one as it is now or as a new one."""
        return Cycles(cycles=[*(known for known in self.cycles if known.number != cycle.number), cycle])


def cycles_path(name: str) -> str:
    return f"recurring/{name}.json"


def read_cycles(store: Store, name: str) -> tuple[Cycles, bytes | None]:
    """All cycles and the bytes they were read from; none before the first run."""
    try:
        data = store.read(cycles_path(name))
    except FileNotFoundError:
        return Cycles(), None
    return parsed(store, cycles_path(name), data, Cycles), data


def change(store: Store, name: str, step: Callable[[Cycles], Cycle]) -> Cycle:
    """Enter the cycle that ``step`` makes of those known; where another writer comes first, of what it left."""
    while True:
        cycles, data = read_cycles(store, name)
        cycle = step(cycles)
        if store.swap(cycles_path(name), data, sealed(cycles.with_last(cycle))):
            return cycle


def update(store: Store, name: str, number: int, **fields: object) -> Cycle:
    """Note down what became of a cycle."""

    def step(cycles: Cycles) -> Cycle:
        known = next(cycle for cycle in cycles.cycles if cycle.number == number)
        return Cycle.model_validate({**known.model_dump(), **fields})

    return change(store, name, step)

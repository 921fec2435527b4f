"""What a run begins with: its settings as they stand now, what models and sources hold, and what earlier runs left.

A run that stands alone begins with its settings. Of runs that follow each other (section ``recurring``) each begins
with a cycle: the one that was left open, or a new one with the files and the teacher queries there are.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from flows.record import run_id
from infra.store import Store
from tasks.config import RunConfig
from tasks.config.models import PromotedModel
from tasks.config.prompts import InboxSource
from tasks.cycles import Cycle, Cycles, change, read_cycles
from tasks.inbox import InboxFile, arrived, current, expand
from tasks.models import identity as model_identity
from tasks.sources import identity as source_identity


class NothingToDo(Exception):
    """A run has nothing to begin with, which is no fault. The message says why."""


@dataclass(frozen=True)
class Start:
    """What a run begins with. ``found`` is what the story is told with."""

    config: RunConfig
    run: str
    found: dict[str, Any]
    cycle: Cycle | None = None


def look(config: RunConfig, store: Store) -> Start:
    """What a run would begin with, changing nothing. NothingToDo where it would end at once."""
    if config.recurring is None:
        return Start(config, run_id(config), identities(config, {}))
    cycles, _ = read_cycles(store, config.name)
    return start_of(config, cycles, next_cycle(config, cycles, datetime.now(UTC)))


def begin(config: RunConfig, store: Store, now: datetime | None = None) -> Start:
    """Open the next cycle, or go on with the open one. NothingToDo where there is nothing to begin with."""

    def step(cycles: Cycles) -> Cycle:
        cycle = next_cycle(config, cycles, now or datetime.now(UTC))
        return cycle.model_copy(update={"run": run_of(config, cycle)})

    cycle = change(store, config.name, step)
    return start_of(config, read_cycles(store, config.name)[0], cycle)


def next_cycle(config: RunConfig, cycles: Cycles, now: datetime) -> Cycle:
    """The cycle left open, with the files it has if they are still the same or taken already; else a new one."""
    last = cycles.last
    is_open = last is not None and last.state == "open"
    if last and is_open and (last.prompts or all(map(current, last.all_files))):
        return last
    files: dict[int, list[InboxFile]] = {}
    waiting: dict[str, str] = {}
    for position, source in enumerate(config.prompts.sources):
        if isinstance(source, InboxSource):
            chosen = [file for others in files.values() for file in others]
            files[position], late = arrived(source, [*cycles.taken, *chosen])
            waiting |= late
    if files and not any(files.values()):
        raise NothingToDo("nothing new" + "".join(f"; {path} waits: {reason}" for path, reason in waiting.items()))
    if last and is_open:
        return last.model_copy(update={"files": files})
    queries = allowance(config, cycles, f"{now:%Y-%m}")
    return Cycle(number=last.number + 1 if last else 1, opened=now, files=files, queries=queries)


def allowance(config: RunConfig, cycles: Cycles, month: str) -> int:
    """Teacher queries of a run: its own budget, or what is left of the month's. NothingToDo where that is too little to
    share among both stages."""
    assert config.recurring
    queries, limit = config.budget.queries, config.recurring.queries_per_month
    if limit is not None:
        charged = cycles.charged(month)
        queries = min(queries, limit - charged)
        left = config.model_copy(update={"budget": config.budget.model_copy(update={"queries": queries})})
        if left.leaves_a_stage_none:
            raise NothingToDo(f"no teacher queries left: {charged:,} of {limit:,} of {month} are used")
    return queries


def settled(config: RunConfig, cycle: Cycle) -> RunConfig:
    """A cycle's settings: inboxes as the files it takes, the budget it was given, a student of the right shape."""
    sources: list[Any] = []
    for position, source in enumerate(config.prompts.sources):
        files = cycle.files.get(position, [])
        sources += expand(source, files) if isinstance(source, InboxSource) else [source]
    student = config.models.student
    first = student.first if isinstance(student, PromotedModel) else student
    queries = min(config.budget.queries, cycle.queries)
    parts = {
        "prompts": config.prompts.model_copy(update={"sources": sources}),
        "models": config.models.model_copy(update={"student": first}),
        "budget": config.budget.model_copy(update={"queries": queries}),
    }
    return RunConfig.model_validate(config.model_copy(update=parts).model_dump(mode="json"))


def run_of(config: RunConfig, cycle: Cycle) -> str:
    """The run's id: settings that are corrected while a cycle is open do not make it another run."""
    return f"{config.name}-{cycle.number:04d}"


def start_of(config: RunConfig, cycles: Cycles, cycle: Cycle) -> Start:
    """What a cycle's run begins with."""
    earlier = [known for known in cycles.done if known.number < cycle.number]
    after = {
        "number": cycle.number,
        "earlier": [known.prompts for known in earlier],
        "kept": [path for known in earlier for path in known.kept],
    }
    own = settled(config, cycle)
    found = identities(own, {file.path: file.content for file in cycle.all_files})
    found |= {"warm": isinstance(config.models.student, PromotedModel), "after": after}
    return Start(own, run_of(config, cycle), found, cycle)


def identities(config: RunConfig, contents: dict[str, str]) -> dict[str, Any]:
    """What models and sources hold now. Read once, before the story: it decides what is done already. ``contents``:
    what is known of files by their path."""
    sources = [*config.prompts.sources, *config.prompts.heldout_sources]
    return {
        "models": {role: model_identity(model.source) for role, model in config.served.items()},
        "sources": [contents.get(getattr(source, "path", "")) or source_identity(source) for source in sources],
        "warm": False,
        "after": None,
    }

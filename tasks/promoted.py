"""The promoted student of a pipeline: where it stands in the store, how it moves, and how it returns.

``promoted/<name>.json`` is the promoted student. It moves by ``swap``, so of two that would move it one is told so.
``promoted/<name>/000003.json`` are all entries that ever stood there, in order: a move files the new entry once it
stands, and the old one first if a crash left it out.
"""

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel

from infra.manifest import DamagedError, parsed, sealed
from infra.store import Store, StorePath


class Promotion(BaseModel):
    """One entry: a student, and why it stands there."""

    name: str
    number: int
    action: Literal["promoted", "rolled_back"] = "promoted"
    at: datetime
    run: str
    fingerprint: str  # of the report that promoted it
    manifest: StorePath  # of that report; it names the student's model
    student: StorePath
    report: StorePath
    reason: str
    verdict: str
    metrics: dict[str, Any]
    previous: int | None = None  # entry whose student a rollback returns to
    replaced: int | None = None  # entry that a rollback took away


def current_path(name: str) -> str:
    return f"promoted/{name}.json"


def entry_path(name: str, number: int) -> str:
    return f"promoted/{name}/{number:06d}.json"


def names(store: Store) -> list[str]:
    """Pipelines with a promoted student."""
    parts = [path.split("/") for path in store.list("promoted")]
    return [part[1].removesuffix(".json") for part in parts if len(part) == 2]


def entry_of(store: Store, name: str, path: str, data: bytes) -> Promotion:
    """An entry of this pipeline; DamagedError where it is none, or another's: a move would look for it elsewhere."""
    entry = parsed(store, path, data, Promotion)
    if entry.name != name:
        raise DamagedError(store.location(path), path, "is damaged (it is of another pipeline)")
    return entry


def standing(store: Store, name: str) -> tuple[Promotion | None, bytes | None]:
    """The promoted student and the bytes it was read from; None before the first promotion."""
    try:
        data = store.read(current_path(name))
    except FileNotFoundError:
        return None, None
    return entry_of(store, name, current_path(name), data), data


def current(store: Store, name: str) -> Promotion | None:
    return standing(store, name)[0]


def history(store: Store, name: str) -> list[Promotion]:
    """All entries, oldest first; the one that stands now is among them."""
    filed = [entry_of(store, name, path, store.read(path)) for path in store.list(f"promoted/{name}")]
    now = current(store, name)
    return filed + ([now] if now and now.number not in {entry.number for entry in filed} else [])


def move(store: Store, old: Promotion | None, old_bytes: bytes | None, new: Promotion) -> bool:
    """Put ``new`` in the place of what was read. False where another moved it meanwhile."""
    if old and old_bytes:
        store.create(entry_path(old.name, old.number), old_bytes)
    data = sealed(new)
    if not store.swap(current_path(new.name), old_bytes, data):
        return False
    store.create(entry_path(new.name, new.number), data)
    return True


def promote(store: Store, name: str, over: str | None, **entry: Any) -> Promotion | None:
    """Make this student the promoted one in the place of ``over`` (a fingerprint; None: of nothing). None where another
    student stands there, unless the same run put it there.

    Doing it again, as after a crash, changes nothing, not even after a rollback.
    """
    run, fingerprint = entry["run"], entry["fingerprint"]
    for known in history(store, name):
        if known.action == "promoted" and known.fingerprint == fingerprint:
            return known
    while True:
        old, old_bytes = standing(store, name)
        if (old.fingerprint if old else None) != over and (old is None or old.run != run):
            return None
        number, previous = (old.number + 1, old.number) if old else (1, None)
        new = Promotion(name=name, number=number, at=datetime.now(UTC), previous=previous, **entry)
        if move(store, old, old_bytes, new):
            return new


def roll_back(store: Store, name: str) -> tuple[Promotion, Promotion]:
    """Return to the student before the promoted one: (what stands now, what was taken away). ValueError where nothing
    was before."""
    while True:
        old, old_bytes = standing(store, name)
        if old is None:
            raise ValueError(f"--name: {name!r} has no promoted student")
        if old.previous is None:
            raise ValueError(f"--name: {name!r} has no student before {old.student} (entry {old.number})")
        entry = entry_path(name, old.previous)
        if not store.exists(entry):
            raise DamagedError(store.location(entry), entry, f"is missing, to which entry {old.number} rolls back")
        back = entry_of(store, name, entry, store.read(entry))
        new = back.model_copy(
            update={
                "number": old.number + 1,
                "action": "rolled_back",
                "at": datetime.now(UTC),
                "reason": f"rolled back from entry {old.number}",
                "replaced": old.number,
            }
        )
        if move(store, old, old_bytes, new):
            return new, old

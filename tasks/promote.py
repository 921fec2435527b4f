"""Promotion: a new student takes the promoted one's place if it beats the base student outside the interval.

``promoted/<run>.json`` is the promoted student; it moves atomically. ``promoted/<run>/<fingerprint>.json`` keeps every
entry that ever stood there. Both are written by the report stage, at its end.
"""

import json
from datetime import UTC, datetime
from typing import Any, NamedTuple

from infra.store import Store
from tasks.config.evaluate import PromoteConfig
from tasks.metrics import Results
from tasks.verdict import SHOWN, in_sentence, outcome


class Decision(NamedTuple):
    """Whether the student is promoted, and why."""

    promoted: bool
    reason: str


def decide(results: Results, promote: PromoteConfig, has_student: bool) -> Decision:
    """Promoted if the whole paired interval of final − base lies on the better side of 0."""
    if not promote.enabled:
        return Decision(False, "promotion is switched off (promote.enabled)")
    if not has_student:
        return Decision(False, "this run trained no student")
    metric, shown = promote.metric, SHOWN[promote.metric]
    change = results.differences["final-base"]
    bounds = change[f"{metric}_ci"]
    if bounds is None:
        return Decision(False, f"{in_sentence(metric)} of final and base student is not known on the same problems")
    figures = (
        f"{in_sentence(metric)} final − base is {shown.number(change[metric], signed=True)} {shown.of_difference}, "
        f"interval {shown.interval(bounds, signed=True)}"
    )
    sides = {
        "better": "better than the base student outside the interval",
        "worse": "worse than the base student outside the interval",
        "unclear": "the interval holds 0, so the student is not shown to be better",
    }
    side = outcome(metric, bounds)
    return Decision(side == "better", f"{figures}: {sides[side]}")


def current_path(run: str) -> str:
    return f"promoted/{run}.json"


def current(store: Store, run: str) -> dict[str, Any] | None:
    """The promoted student's entry, None before the first promotion."""
    path = current_path(run)
    return json.loads(store.read(path)) if store.exists(path) else None


def move(store: Store, run: str, fingerprint: str, entry: dict[str, Any]) -> str:
    """Make this student the promoted one; returns the path of its entry in the history.

    Doing it again, as after a crash, changes nothing: the history's entry is created once and holds time and
    predecessor.
    """
    history = f"promoted/{run}/{fingerprint}.json"
    before = current(store, run)
    record = {
        "run": run,
        "fingerprint": fingerprint,
        **entry,
        "promoted_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "previous": f"promoted/{run}/{before['fingerprint']}.json" if before else None,
    }
    store.create(history, json.dumps(record, indent=1).encode())
    store.write(current_path(run), store.read(history))
    return history

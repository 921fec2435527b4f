"""The gate: is the new student promoted, and why or why not? Pure; ``tasks/promoted.py`` moves it.

Where none is promoted yet, the student must beat the base student outside the interval. Afterwards it must beat the
promoted one, on the same held-out rows with the same seeds, and stay within limits on length, ends and single tasks.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from tasks.config.base import Config
from tasks.config.evaluate import PromoteConfig
from tasks.metrics import PROMOTED, Results
from tasks.verdict import SHOWN, in_sentence, outcome


class Rival(Config):
    """The student that was promoted when the run began."""

    label: Literal["base", "promoted"]
    """Under which label it was measured: ``base`` where training started from it."""
    fingerprint: str
    """Of the report that promoted it."""


class Check(NamedTuple):
    """One condition, in words with its figures."""

    passed: bool
    text: str


class Decision(NamedTuple):
    """Whether the student is promoted, and why."""

    promoted: bool
    reason: str
    checks: tuple[Check, ...] = ()  # where there were several


def decide(results: Results, promote: PromoteConfig, has_student: bool, rival: Rival | None) -> Decision:
    """Promoted if the whole paired interval lies on the better side of 0, and all limits hold."""
    if not promote.enabled:
        return Decision(False, "promotion is switched off (promote.enabled)")
    if not has_student:
        return Decision(False, "this run trained no student")
    label = rival.label if rival else "base"
    found = [beats(results, promote, label, PROMOTED if rival else "base")]
    if rival:
        found += limits(results, promote, label)
    failed = [check.text for check in found if not check.passed]
    return Decision(not failed, "; ".join(failed) or found[0].text, tuple(found) if len(found) > 1 else ())


def beats(results: Results, promote: PromoteConfig, label: str, called: str) -> Check:
    """Better than the model evaluated as ``label``, outside the interval?"""
    metric, shown = promote.metric, SHOWN[promote.metric]
    change = results.differences.get(f"final-{label}", {})
    bounds = change.get(f"{metric}_ci")
    if bounds is None:
        return Check(False, f"{in_sentence(metric)} of final and {called} student is not known on the same problems")
    figures = (
        f"{in_sentence(metric)} final − {called} is {shown.number(change[metric], signed=True)} {shown.of_difference}, "
        f"interval {shown.interval(bounds, signed=True)}"
    )
    sides = {
        "better": f"better than the {called} student outside the interval",
        "worse": f"worse than the {called} student outside the interval",
        "unclear": "the interval holds 0, so the student is not shown to be better",
    }
    side = outcome(metric, bounds)
    return Check(side == "better", f"{figures}: {sides[side]}")


def limits(results: Results, promote: PromoteConfig, label: str) -> Iterator[Check]:
    """What must not be paid for a better metric, against the model evaluated as ``label``."""
    new, old = results.habits.get("final"), results.habits.get(label)
    if new is None or old is None:
        yield Check(False, "responses of final and promoted student are not known")
    else:
        ratio = new.tokens / old.tokens if old.tokens else 1.0
        yield Check(
            promote.min_length <= ratio <= promote.max_length,
            f"responses are {ratio:.2f} times as long (limits {promote.min_length:g} to {promote.max_length:g})",
        )
        lost = round(old.eos_rate - new.eos_rate, 9)  # at the limit is within it
        yield Check(
            lost <= promote.max_eos_loss,
            f"{100 * new.eos_rate:.1f} % of responses end by themselves, {100 * old.eos_rate:.1f} % before "
            f"(limit {100 * promote.max_eos_loss:g} points less)",
        )
    judged = {name: part for name, part in results.by_source.items() if part.problems >= promote.task_problems}
    bounds = {name: part.differences[f"final-{label}"][f"{promote.metric}_ci"] for name, part in judged.items()}
    worse = [name for name in judged if outcome(promote.metric, bounds[name]) == "worse"]
    named = f" ({', '.join(worse)})" if worse else ""
    yield Check(
        len(worse) <= promote.max_worse_tasks,
        f"{len(worse)} of {len(judged)} tasks got worse{named} (limit {promote.max_worse_tasks})",
    )

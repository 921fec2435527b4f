"""Quality for cost: what a run gained for its teacher queries, tokens, hours and money. Read from manifests alone.

Queries, tokens and money are those charged to the budget; what had to be sent again is told apart, in ``accounts``.
"""

from dataclasses import dataclass
from typing import Any

from infra.manifest import Manifest
from tasks.accounts import annotations, fact, money, online_teacher_tokens, teacher_queries, total
from tasks.config.budget import Budget
from tasks.metrics import METRICS, Measured

Manifests = dict[str, Manifest]
KEYS = ("per_1000_queries", "per_million_teacher_tokens", "per_device_hour", "per_money")


@dataclass(frozen=True)
class Rate:
    """So much of one thing that a run took. ``size``: what of it a gain is told for."""

    key: str  # of the gain, such as per_1000_queries
    name: str  # of what it is told for
    amount: float | None
    size: float

    def gains(self, difference: Measured) -> Measured:
        """A difference of metrics with its intervals for ``size`` of it, in each metric's own unit."""
        if not self.amount:
            return dict.fromkeys(difference)
        scale = self.size / self.amount
        gains: Measured = {}
        for metric in METRICS:
            value, bounds = difference[metric], difference[f"{metric}_ci"]
            gains[metric] = None if value is None else value * scale
            gains[f"{metric}_ci"] = None if bounds is None else [bound * scale for bound in bounds]
        return gains


def teacher_tokens(manifests: Manifests) -> int | None:
    """Tokens the teacher read and wrote for annotation, and positions of rollouts it was asked about in training."""
    annotated = []
    for name in annotations(manifests):
        charged = fact(manifests, name, "charged") or (manifests[name].facts if name in manifests else {})
        annotated.append(total((charged.get("prompt_tokens"), charged.get("completion_tokens"))))
    return total((*annotated, online_teacher_tokens(manifests)))


def device_hours(manifests: Manifests) -> float:
    """Hours of the GPUs that each stage worked on; a machine without GPUs is one device."""
    return sum(manifest.seconds * manifest.facts.get("devices", 1) for manifest in manifests.values()) / 3600


def rates(manifests: Manifests, budget: Budget) -> list[Rate]:
    """What gains are told for; money where it has a price."""
    found = [
        Rate("per_1000_queries", "1,000 teacher queries", teacher_queries(manifests), 1000),
        Rate("per_million_teacher_tokens", "million teacher tokens", teacher_tokens(manifests), 1e6),
        Rate("per_device_hour", "device-hour", device_hours(manifests), 1),
    ]
    if budget.price is not None:
        found.append(Rate("per_money", budget.price.currency, money(manifests, budget), 1))
    return found


def quality_for_cost(difference: Measured, manifests: Manifests, budget: Budget) -> dict[str, dict[str, Any]]:
    """For facts: by key, what was gained for so much, and how much the run took."""
    return {
        rate.key: {"for": rate.name, "took": rate.amount, **rate.gains(difference)} for rate in rates(manifests, budget)
    }

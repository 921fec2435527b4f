"""Accounts: where rows went, what each stage took, and what a teacher query bought. Read from manifests alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from infra.manifest import Manifest
from tasks.config.budget import Budget

# What each stage does, in the order of the method; others follow under their own names.
STAGES = {
    "models": "Models made ready",
    "prompts": "Prompts read and cleaned",
    "warmup-annotate": "Teacher annotates for the warm-up",
    "warmup-keep": "TA scores the warm-up's annotations",
    "warmup-auxiliary": "Teacher writes the warm-up's auxiliary targets",
    "warmup-train": "Stage 1: warm-up training",
    "student-sample": "Warmed-up student answers candidates",
    "select": "TA scores the student, queries are chosen",
    "annotate": "Teacher annotates what was chosen",
    "keep": "TA scores these annotations",
    "auxiliary": "Teacher writes auxiliary targets of what was chosen",
    "replay": "Rows of earlier runs drawn for replay",
    "train": "Stage 2: training",
    "evaluate-before": "Base student and teacher evaluated",
    "evaluate-after": "Trained students evaluated",
}
Manifests = dict[str, Manifest]
# Stages whose queries are charged to the budget, in their order; the first ones are the warm-up's.
WARMUP = ("warmup-annotate", "warmup-auxiliary")
ANNOTATIONS = (*WARMUP, "annotate", "auxiliary")


@dataclass(frozen=True)
class Level:
    """One level of the funnel: rows that came this far, and how many of them by way of the warm-up."""

    name: str
    rows: int
    warmup: int = 0
    note: str = ""


@dataclass(frozen=True)
class Account:
    """One unit of the budget: what queries are charged, and what was sent in all, repeated requests included."""

    unit: str
    charged: float
    cap: float | None
    spent: float
    spending_cap: float | None

    @property
    def left(self) -> float | None:
        return None if self.cap is None else self.cap - self.charged


@dataclass(frozen=True)
class Cost:
    """What one stage took. None: does not apply, or is not known."""

    name: str
    title: str
    seconds: float
    rows: int | None
    teacher_queries: int | None
    teacher_tokens: int | None  # written by the teacher, or asked of it online
    tokens: int | None  # response tokens written, or trained on
    tokens_per_second: float | None


def in_order(manifests: Manifests) -> list[str]:
    """Names of the inputs, in the order of the method."""
    return [name for name in STAGES if name in manifests] + sorted(set(manifests) - set(STAGES))


def rows(manifests: Manifests, name: str, table: str) -> int | None:
    """Rows of an input's table; None where either is absent."""
    found = manifests[name].tables.get(table) if name in manifests else None
    return None if found is None else found.rows


def total(values: Iterable[int | None]) -> int | None:
    """The sum of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def fact(manifests: Manifests, name: str, key: str) -> Any:
    return manifests[name].facts.get(key) if name in manifests else None


def funnel(manifests: Manifests) -> list[Level]:
    """Levels that are known, from rows read to rows trained on."""
    prompts, warmup, heldout, refused = (
        rows(manifests, "prompts", table) for table in ("prompts", "warmup", "heldout", "quarantine")
    )
    # Some prompts may be read for the held-out set and not be needed there.
    read = (fact(manifests, "prompts", "counts") or {}).get("read") or total((prompts, heldout, refused))
    queried, warm = (total(fact(manifests, name, "queries") for name in names) for names in (ANNOTATIONS, WARMUP))
    kept = [rows(manifests, name, "kept") for name in ("warmup-keep", "keep")]
    beside = [rows(manifests, name, "kept") for name in ("warmup-auxiliary", "auxiliary")]
    own = fact(manifests, "keep", "stand_ins")
    trained = (fact(manifests, "train", "data") or fact(manifests, "warmup-train", "data") or {}).get("rows")
    aside = (fact(manifests, "train", "data") or {}).get("validation_rows")
    levels = [
        ("Rows read", read, None, ""),
        ("Prompts to learn from", prompts, warmup, f"{heldout:,} more held out for the evaluation" if heldout else ""),
        ("Candidates the student answered", rows(manifests, "select", "signals"), None, ""),
        ("Teacher queries", queried, warm, ""),
        ("Annotations kept", total(kept), kept[0], f"{own:,} of them the student's own text" if own else ""),
        ("Auxiliary targets kept", total(beside), beside[0], ""),
        ("Rows trained on", trained, None, f"{aside:,} more set aside for validation" if aside else ""),
    ]
    return [Level(name, count, warm or 0, note) for name, count, warm, note in levels if count is not None]


def teacher_queries(manifests: Manifests) -> int | None:
    """Annotation queries charged to the budget."""
    return total(fact(manifests, name, "queries") for name in ANNOTATIONS)


def accounts(manifests: Manifests, budget: Budget) -> list[Account]:
    """The budget by unit: queries always, tokens, money where it has a price. Empty before the first annotation."""
    last = next((name for name in reversed(ANNOTATIONS) if fact(manifests, name, "charged_in_all")), None)
    if last is None:
        return []
    charged, spent = (manifests[last].facts[key] for key in ("charged_in_all", "spent_in_all"))

    def account(unit: str, cap: float | None, *parts: str) -> Account:
        amounts = [sum(found[part] for part in parts) for found in (charged, spent)]
        return Account(unit, amounts[0], cap, amounts[1], None if cap is None else cap * budget.spending_factor)

    found = [
        account("queries", budget.queries, "queries"),
        account("tokens", budget.tokens, "prompt_tokens", "completion_tokens"),
    ]
    if budget.price is not None:
        price, tokens = budget.price, ("prompt_tokens", "completion_tokens")
        paid = [float(price.of(*(amounts[name] for name in tokens))) for amounts in (charged, spent)]
        most = None if budget.money is None else budget.money * budget.spending_factor
        found.append(Account(price.currency, paid[0], budget.money, paid[1], most))
    return found


def online_teacher_tokens(manifests: Manifests) -> int | None:
    """Positions the teacher was asked about during training."""
    return total(fact(manifests, name, "online_teacher_tokens") for name in ("warmup-train", "train"))


def costs(manifests: Manifests) -> list[Cost]:
    """One entry an input, in the order of the method."""
    entries = []
    for name in in_order(manifests):
        manifest, facts = manifests[name], manifests[name].facts
        annotates = name in ANNOTATIONS
        references = manifest.tables.get("references")
        entries.append(
            Cost(
                name=name,
                title=STAGES.get(name, name),
                seconds=manifest.seconds,
                rows=total(table.rows for table in manifest.tables.values()),
                # References by the teacher cost queries too, outside the budget.
                teacher_queries=facts.get("queries") if annotates else references.rows if references else None,
                teacher_tokens=facts.get("completion_tokens") if annotates else facts.get("online_teacher_tokens"),
                tokens=facts.get("completion_tokens", facts.get("tokens")),
                tokens_per_second=facts.get("tokens_per_second"),
            )
        )
    return entries

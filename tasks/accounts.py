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
    "warmup-review": "Teachers review each other's warm-up annotations",
    "warmup-keep": "TA scores the warm-up's annotations",
    "warmup-auxiliary": "Teacher writes the warm-up's auxiliary targets",
    "warmup-train": "Stage 1: warm-up training",
    "student-sample": "Student answers candidates",
    "select": "TA scores the student, queries are chosen",
    "annotate": "Teacher annotates what was chosen",
    "review": "Teachers review each other's annotations",
    "keep": "TA scores these annotations",
    "mentor-train": "Mentor fine-tuned on what was kept",
    "mentor-annotate": "Mentor annotates further prompts",
    "mentor-keep": "TA scores the mentor's annotations",
    "auxiliary": "Teacher writes auxiliary targets of what was chosen",
    "replay": "Rows of earlier runs drawn for replay",
    "train": "Stage 2: training",
    "evaluate-before": "Base student and teacher evaluated",
    "evaluate-after": "Trained students evaluated",
}
Manifests = dict[str, Manifest]
# Stages whose queries are charged to the budget, in their order; those of further teachers have their names behind it.
ANNOTATIONS = ("warmup-annotate", "warmup-auxiliary", "annotate", "auxiliary")


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


def annotates(stage: str) -> bool:
    """Whether a stage's queries are charged to the budget."""
    return teacher_named(stage)[0] in ANNOTATIONS


def teacher_named(stage: str) -> tuple[str, str]:
    """A stage without the further teacher's name behind it, and that name."""
    for name in ANNOTATIONS:
        if stage.startswith(f"{name}-"):
            return name, stage.removeprefix(f"{name}-")
    return stage, ""


def title(stage: str) -> str:
    """What a stage does."""
    plain, teacher = teacher_named(stage)
    return f"{STAGES.get(plain, plain)}{teacher and f' ({teacher})'}"


def annotations(manifests: Manifests) -> list[str]:
    """Inputs whose queries are charged to the budget."""
    return [name for name in in_order(manifests) if annotates(name)]


def in_order(manifests: Manifests) -> list[str]:
    """Names of the inputs, in the order of the method."""
    places = {name: number for number, name in enumerate(STAGES)}
    return sorted(manifests, key=lambda name: (places.get(teacher_named(name)[0], len(places)), name))


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
    asked = annotations(manifests)
    warm = total(fact(manifests, name, "queries") for name in asked if name.startswith("warmup-"))
    kept = [rows(manifests, name, "kept") for name in ("warmup-keep", "keep")]
    beside = [rows(manifests, name, "kept") for name in ("warmup-auxiliary", "auxiliary")]
    trained = (fact(manifests, "train", "data") or fact(manifests, "warmup-train", "data") or {}).get("rows")
    aside = (fact(manifests, "train", "data") or {}).get("validation_rows")
    levels = [
        ("Rows read", read, None, ""),
        ("Prompts to learn from", prompts, warmup, f"{heldout:,} more held out for the evaluation" if heldout else ""),
        ("Candidates the student answered", rows(manifests, "select", "signals"), None, ""),
        ("Teacher queries", teacher_queries(manifests), warm, by_teacher(manifests)),
        ("Annotations kept", total(kept), kept[0], "; ".join(filter(None, (doubted(manifests), stood_in(manifests))))),
        ("Mentor's annotations kept", rows(manifests, "mentor-keep", "kept"), None, mentored(manifests)),
        ("Auxiliary targets kept", total(beside), beside[0], ""),
        ("Rows trained on", trained, None, f"{aside:,} more set aside for validation" if aside else ""),
    ]
    return [Level(name, count, warm or 0, note) for name, count, warm, note in levels if count is not None]


def by_teacher(manifests: Manifests) -> str:
    """Queries by teacher, in words, where there are several."""
    counts: dict[str, int] = {}
    for name in annotations(manifests):
        teacher = teacher_named(name)[1] or "teacher"
        counts[teacher] = counts.get(teacher, 0) + (fact(manifests, name, "queries") or 0)
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) if len(counts) > 1 else ""


def doubted(manifests: Manifests) -> str:
    """Annotations that the other teachers doubted, in words, where they were asked."""
    if not any(fact(manifests, name, "reviews") for name in ("warmup-review", "review")):
        return ""
    dropped = [(fact(manifests, name, "reasons") or {}).get("peer_review", 0) for name in ("warmup-keep", "keep")]
    return f"{sum(dropped):,} dropped by peer review"


def stood_in(manifests: Manifests) -> str:
    """Rows of the student's own text, in words."""
    count = fact(manifests, "keep", "stand_ins")
    return f"{count:,} of them the student's own text" if count else ""


def mentored(manifests: Manifests) -> str:
    """What the mentor wrote, in words."""
    written = fact(manifests, "mentor-annotate", "queries")
    return f"of {written:,}, which cost no teacher query" if written is not None else ""


def teacher_queries(manifests: Manifests) -> int | None:
    """Annotation queries charged to the budget."""
    return total(fact(manifests, name, "queries") for name in annotations(manifests))


def accounts(manifests: Manifests, budget: Budget) -> list[Account]:
    """The budget by unit: queries always, tokens, money where it has a price. Empty before the first annotation."""
    known = [name for name in annotations(manifests) if fact(manifests, name, "charged_in_all")]
    if not known:
        return []
    # Each counts those before it: the last one has the most.
    last = max(known, key=lambda name: manifests[name].facts["spent_in_all"]["queries"])
    charged, spent = (manifests[last].facts[key] for key in ("charged_in_all", "spent_in_all"))

    def account(unit: str, cap: float | None, *parts: str) -> Account:
        amounts = [sum(found[part] for part in parts) for found in (charged, spent)]
        return Account(unit, amounts[0], cap, amounts[1], None if cap is None else cap * budget.spending_factor)

    found = [
        account("queries", budget.queries, "queries"),
        account("tokens", budget.tokens, "prompt_tokens", "completion_tokens"),
    ]
    if budget.price is not None:
        paid = [money(manifests, budget, key) or 0.0 for key in ("charged", "spent")]
        most = None if budget.money is None else budget.money * budget.spending_factor
        found.append(Account(budget.price.currency, paid[0], budget.money, paid[1], most))
    return found


def money(manifests: Manifests, budget: Budget, key: str = "charged") -> float | None:
    """Price of the annotation queries, each teacher's by its own; of what was ``charged``, or ``spent``. None without a
    price."""
    found = []
    for name in annotations(manifests):
        amounts, price = fact(manifests, name, key), budget.price_of(teacher_named(name)[1])
        if amounts and price:
            found.append(price.of(amounts["prompt_tokens"], amounts["completion_tokens"]))
    return float(sum(found)) if found else None


def online_teacher_tokens(manifests: Manifests) -> int | None:
    """Positions the teacher was asked about during training."""
    return total(fact(manifests, name, "online_teacher_tokens") for name in ("warmup-train", "train"))


def costs(manifests: Manifests) -> list[Cost]:
    """One entry an input, in the order of the method."""
    entries = []
    for name in in_order(manifests):
        manifest, facts = manifests[name], manifests[name].facts
        annotated = annotates(name)
        references = manifest.tables.get("references")
        entries.append(
            Cost(
                name=name,
                title=title(name),
                seconds=manifest.seconds,
                rows=total(table.rows for table in manifest.tables.values()),
                # References by the teacher cost queries too, outside the budget.
                teacher_queries=facts.get("queries") if annotated else references.rows if references else None,
                teacher_tokens=facts.get("completion_tokens") if annotated else facts.get("online_teacher_tokens"),
                tokens=facts.get("completion_tokens", facts.get("tokens")),
                tokens_per_second=facts.get("tokens_per_second"),
            )
        )
    return entries

"""The page: everything a run found, as one HTML file. Words and figures come ready; the template only places them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from infra.parts import read_table
from infra.store import Store
from tasks import findings, overview
from tasks.accounts import (
    Manifests,
    accounts,
    annotations,
    costs,
    funnel,
    in_order,
    online_teacher_tokens,
    teacher_named,
    teacher_queries,
)
from tasks.config.run import RunConfig
from tasks.metrics import METRICS, SOURCES, Results
from tasks.promote import Decision
from tasks.stage import Stage
from tasks.value import rates
from tasks.verdict import NAMES, SHOWN, details, headline, outcome

if TYPE_CHECKING:
    from tasks.report import ReportSettings

# Percentile intervals over fewer problems cover the truth clearly less often than they say.
FEW = 20
# Where rows are refused, dropped or left: (input, table, what such a row is).
REFUSALS = (
    ("prompts", "quarantine", "Refused rows"),
    ("annotate", "quarantine", "Prompts the teacher's engine died of"),
    ("student-sample", "quarantine", "Prompts the student's engine died of"),
    ("select", "signals", "Candidates"),
    ("warmup-keep", "scores", "Warm-up annotations"),
    ("keep", "scores", "Later annotations"),
    ("mentor-annotate", "quarantine", "Prompts the mentor's engine died of"),
    ("mentor-keep", "scores", "The mentor's annotations"),
    ("warmup-auxiliary", "targets", "Auxiliary targets of the warm-up"),
    ("auxiliary", "targets", "Later auxiliary targets"),
)


def write(
    folder: Path,
    stage: "Stage[ReportSettings]",
    config: RunConfig,
    manifests: Manifests,
    results: Results,
    decision: Decision,
) -> None:
    """Write ``index.html`` and ``overview.png``."""
    settings, store = stage.settings, stage.store
    figures = {
        "results": findings.measured(results),
        "consistency": findings.consistency(store, manifests),
        "warmup": findings.training(store, manifests, "warmup-train", "Stage 1", config.warmup),
        "train": findings.training(store, manifests, "train", "Stage 2", config.train),
    }
    figures["confidence"], calibrations = findings.confidence(store, manifests)
    levels, gained = funnel(manifests), results.differences["final-base"]
    said, head = details(results, settings.evaluate.confidence), headline(results)
    # ROUGE-L keeps its capitals.
    said = f"{said[0].upper()}{said[1:]}."
    text = environment().get_template("report.html.j2").render(
        name=settings.name,
        seed=settings.seed,
        fingerprint=stage.spec.fingerprint,
        headline=head,
        details=said,
        decision=decision,
        models=model_rows(manifests),
        results=results,
        confidence=settings.evaluate.confidence,
        seeds=len(settings.evaluate.seeds),
        figures=figures,
        calibrations=calibrations,
        gains=[(rate.name, rate.gains(gained)) for rate in rates(manifests, settings.budget) if rate.amount],
        levels=levels,
        refusals=list(refusals(store, manifests)),
        samples=findings.side_by_side(store, manifests, settings.seed),
        costs=costs(manifests),
        queries=teacher_queries(manifests),
        accounts=accounts(manifests, settings.budget),
        online=online_teacher_tokens(manifests),
        budget=settings.budget,
        training={name: manifests[name].facts for name in ("warmup-train", "train") if name in manifests},
        settings=flat(config.model_dump(mode="json")),
        versions=versions(manifests),
        manifests={name: manifests[name] for name in in_order(manifests)},
    )  # fmt: skip
    (folder / "index.html").write_text(text, encoding="utf-8")
    chosen = figures["train"][:2] or figures["warmup"][:1]
    lower = [*chosen, *figures["confidence"][-1:], *figures["consistency"]]
    heading = f"{settings.name}: {head[0].lower()}{head[1:]}"
    overview.draw(folder / "overview.png", heading, said, levels, figures["results"], lower)


def environment() -> Environment:
    """Jinja with every text escaped: prompts and responses may hold anything."""
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(count=count, amount=amount, span=span, clip=clip, percent=percent, decimal=decimal)
    found.globals.update(METRICS=METRICS, NAMES=NAMES, SHOWN=SHOWN, SOURCES=SOURCES, FEW=FEW, outcome=outcome)
    return found


def count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def amount(value: float | None) -> str:
    """Of queries, tokens or money: parts of one only where they matter."""
    return count(value) if value is None or float(value).is_integer() else f"{value:,.4f}"


def decimal(value: float | None, digits: int = 2) -> str:
    """NaN and None are unknown."""
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def span(seconds: float) -> str:
    """A time in the two units that matter."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def clip(text: str | None, limit: int = findings.CHARACTERS) -> str:
    """A text's beginning; how much is left out is said."""
    text = text or ""
    return text if len(text) <= limit else f"{text[:limit]}\n… and {len(text) - limit:,} more characters"


def refusals(store: Store, manifests: Manifests) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """(kind of row, [(reason, rows)]), the most frequent first; all rows are counted."""
    further = [(name, teacher_named(name)[1]) for name in annotations(manifests)]
    died = [(name, "quarantine", f"Prompts that {teacher} did not answer") for name, teacher in further if teacher]
    for name, table, kind in (*REFUSALS, *died):
        if name in manifests and table in manifests[name].tables:
            counts: dict[str, int] = {}
            for part in read_table(store, manifests[name], table, ["reason"]):
                for entry in pc.value_counts(part["reason"]).to_pylist():
                    counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
            if counts:
                ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
                yield kind, [(reason.replace("_", " "), rows) for reason, rows in ranked]


def model_rows(manifests: Manifests) -> list[dict[str, Any]]:
    """The models of the run, and the students it made."""
    found = [
        {"role": "teaching assistant" if role == "assistant" else role, **ref}
        for role, ref in (manifests["models"].facts.get("models", {}) if "models" in manifests else {}).items()
    ]
    for name, role in (("warmup-train", "student after stage 1"), ("train", "student after stage 2")):
        if name in manifests and "models" in manifests[name].facts:
            found.append({"role": role, **manifests[name].facts["models"]["student"]})
    return found


def flat(settings: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Settings as {section: [(key.path, value)]}; settings that stand alone are under ``run``."""

    def walk(value: Any, path: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from walk(inner, f"{path}.{key}" if path else key)
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                yield from walk(item, f"{path}[{index}]")
        else:
            yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    sections: dict[str, list[tuple[str, str]]] = {}
    for name, value in settings.items():
        section = name if isinstance(value, dict) else "run"
        sections.setdefault(section, []).extend(walk(value, "" if isinstance(value, dict) else name))
    return sections


def versions(manifests: Manifests) -> dict[str, str]:
    """Versions by package; several where stages ran on different ones."""
    found: dict[str, set[str]] = {}
    for manifest in manifests.values():
        for package, version in manifest.versions.items():
            found.setdefault(package, set()).add(version)
    return {package: " and ".join(sorted(seen)) for package, seen in sorted(found.items())}

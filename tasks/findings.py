"""Findings: the report's figures and samples, read from the input tables with only the columns they need."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup
from numpy.typing import NDArray

from infra.manifest import Manifest
from infra.parts import read_rows, read_table
from infra.store import Store
from kernels.calibration import auroc, brier
from tasks import plots
from tasks.accounts import Manifests
from tasks.canvas import svg
from tasks.config.methods import ExponentialDecay
from tasks.config.train import TrainConfig
from tasks.metrics import LABELS, METRICS, Results
from tasks.verdict import SHOWN

# Held-out prompts shown side by side, and the characters shown of each text.
SAMPLES, CHARACTERS = 6, 1500
# Inches: two figures stand beside each other, or three.
HALF, TALL, THIRD = (5.0, 2.9), (5.0, 3.5), (3.1, 2.1)
STRIP = {"nrows": 2, "sharex": True, "height_ratios": [3.4, 1]}


@dataclass(frozen=True)
class Finding:
    """A figure with what it shows: ``draw(axes, *data)`` on axes that ``layout`` describes."""

    title: str
    note: str
    draw: Callable[..., None]
    data: tuple[Any, ...]
    size: tuple[float, float]
    layout: dict[str, Any]

    @property
    def svg(self) -> Markup:
        name = "".join(letter for letter in self.title.lower() if letter.isalnum() and letter.isascii())
        # Matplotlib has escaped what stands in it.
        return Markup(svg(self.draw, *self.data, name=name, size=self.size, layout=self.layout))  # noqa: S704


class Calibration(NamedTuple):
    """How well the TA knows whether answers of one kind are correct."""

    answers: str
    scored: int
    known: int
    accuracy: float
    brier: float
    auroc: float


def finding(title: str, note: str, draw: Any, *data: Any, size: tuple[float, float] = HALF, **layout: Any) -> Finding:
    return Finding(title, note, draw, data, size, layout)


def columns(
    store: Store, manifests: Manifests, names: Iterable[str], table: str, wanted: list[str]
) -> dict[str, NDArray]:
    """Columns of one table of several inputs, one after the other, as floats with NaN for null."""
    found: dict[str, list[NDArray]] = {column: [np.empty(0)] for column in wanted}
    for name in names:
        if name in manifests and table in manifests[name].tables:
            for part in read_table(store, manifests[name], table, wanted):
                for column in wanted:
                    found[column].append(part[column].cast(pa.float64()).to_numpy())
    return {column: np.concatenate(found.pop(column)) for column in wanted}


def measured(results: Results) -> list[Finding]:
    """The before and after figures, one a metric that was measured."""
    return [
        finding(SHOWN[metric].name, "", plots.dots, results, metric, size=THIRD)
        for metric in METRICS
        if results.known(metric)
    ]


def consistency(store: Store, manifests: Manifests) -> list[Finding]:
    """How many answers the student gave to one prompt, and what that says about them."""
    counts = plots.Counts()
    deciding = ["unique_answers", "correct"]
    for part in read_table(store, manifests["select"], "signals", deciding) if "select" in manifests else ():
        for row in part.group_by(deciding).aggregate([([], "count_all")]).to_pylist():
            counts[row["unique_answers"], row["correct"]] += row["count_all"]
    if not counts:
        return []
    title, note = "How much the student disagrees with itself", "Fewer unique answers mean a more confident student."
    figures = [finding(title, note, plots.unique_answers, counts)]
    if any(correct is not None for _, correct in counts):
        title, note = "Accuracy by number of unique answers", "Dots: shares. Bars: 95 % Wilson intervals."
        figures.append(finding(title, note, plots.accuracy_by_unique, counts))
    return figures


def confidence(store: Store, manifests: Manifests) -> tuple[list[Finding], list[Calibration]]:
    """The TA's confidence in student and teacher, and how well it knows what is correct."""
    asked = {
        "student's answers": (["select"], "signals", "ta_student"),
        "teacher's annotations": (["warmup-keep", "keep"], "scores", "ta_teacher"),
    }
    least = (manifests[name].facts.get("threshold") for name in ("warmup-keep", "keep") if name in manifests)
    dropped = " and ".join(dict.fromkeys(f"{value:.2f}" for value in least if value))
    pairs = calibrated(store, manifests)
    if pairs:
        dropped += " after calibration"
    chosen = manifests["select"].settings["select"]["rule"] if "select" in manifests else None
    figures, calibrations, known = [], [], {}
    for name, (inputs, table, column) in asked.items():
        found = columns(store, manifests, inputs, table, [column, "correct"])
        scored = ~np.isnan(found[column])
        scores, correct = found[column][scored], found["correct"][scored]
        if not len(scores):
            continue
        note = "Doubt draws a query to the teacher." if chosen == "signals" else "Prompts were selected without it."
        if table == "scores":
            note = f"Annotations below {dropped} are dropped." if dropped else "No annotation is dropped for its score."
        figures.append(finding(f"TA's confidence in the {name}", note, plots.confidence, scores, correct))
        if not np.isnan(correct).all():
            known[name] = pair = (scores[~np.isnan(correct)], correct[~np.isnan(correct)] == 1)
            calibrations.append(marks(name, len(scores), *pair))
    for kind, pair in pairs.items():
        calibrations.append(marks(f"annotations, {kind}", len(pair[0]), *pair))
    if pairs:
        known["annotations, calibrated"] = pairs["calibrated"]
    if known:
        note = "On the dashed line answers of 70 % confidence are right in 70 % of cases. Bars: 95 % Wilson intervals."
        figures.append(finding("Is the TA's confidence honest?", note, plots.calibration, known, size=TALL))
    return figures, calibrations


def marks(name: str, scored: int, confidences: NDArray, correct: NDArray) -> Calibration:
    """Of answers that are known to be right or wrong."""
    pair = confidences, correct
    return Calibration(name, scored, len(correct), float(correct.mean()), brier(*pair), auroc(*pair))


def calibrates(keep: Manifest) -> bool:
    """Whether the stage kept by calibrated confidence."""
    return bool(keep.facts.get("calibration", {}).get("used"))


def calibrated(store: Store, manifests: Manifests) -> dict[str, tuple[NDArray, NDArray]]:
    """Confidence in annotations and whether they are correct, before and after calibration, on the same rows: those
    it was not fitted on and whose answer is known. Empty where nothing was calibrated."""
    names = [name for name in ("warmup-keep", "keep") if name in manifests and calibrates(manifests[name])]
    found = columns(store, manifests, names, "scores", ["ta_teacher", "calibrated", "calibrates", "correct"])
    other = (found["calibrates"] == 0) & ~np.isnan(found["correct"]) & ~np.isnan(found["ta_teacher"])
    if not other.any():
        return {}
    correct = found["correct"][other] == 1
    return {
        "as scored": (found["ta_teacher"][other], correct),
        "calibrated": (found["calibrated"][other], correct),
    }


def training(store: Store, manifests: Manifests, name: str, title: str, config: TrainConfig) -> list[Finding]:
    """Curves of one training stage; interventions and rollouts where it had any."""
    wanted = ["loss", "validation_loss", "learning_rate", "response_length", "eos_rate", "intervention_rate"]
    steps = columns(store, manifests, [name], "steps", wanted)
    if not len(steps["loss"]):
        return []
    facts = manifests[name].facts
    note = "Faint: single steps. Bold: their running mean. Validation: the same loss on kept annotations set aside."
    progress = (facts.get("start_validation_loss"), facts.get("best_step"))
    figures = [finding(f"{title}: loss", note, plots.training, steps, *progress, size=TALL, **STRIP)]
    positions = columns(store, manifests, [name], "positions", ["position", "emitted", "interventions", "agreeing"])
    if positions["emitted"].sum():
        gate = getattr(config.method, "gate", None)
        decay = gate if isinstance(gate, ExponentialDecay) else None
        note = "Where the teacher decides, it agrees if both drew one token."
        if decay:
            note = "The teacher decides where both differ by more than τ; it agrees if both drew one token."
        drawn = (plots.interventions, positions, decay)
        figures.append(finding(f"{title}: who writes, by position", note, *drawn, size=TALL, **STRIP))
    if not np.isnan(steps["response_length"]).all():
        note = "A collapse would show as rollouts that all run into the length limit."
        layout = {**STRIP, "height_ratios": [1, 1]}
        figures.append(finding(f"{title}: rollouts", note, plots.rollouts, steps, size=TALL, **layout))
    return figures


def side_by_side(store: Store, manifests: Manifests, seed: int) -> list[dict[str, Any]]:
    """A few held-out prompts, drawn at random and not chosen, with every model's first response and its marks."""
    evaluated = [manifests[name] for name in ("evaluate-before", "evaluate-after") if name in manifests]
    if "prompts" not in manifests or not evaluated:
        return []
    known = read_rows(store, manifests["prompts"], "heldout", ["prompt_id", "source"])
    chosen = draw(known["prompt_id"].to_pylist(), known["source"].to_pylist(), seed)
    shown = {row["prompt_id"]: row for row in matching(store, manifests["prompts"], "heldout", chosen)}
    for manifest in evaluated:
        if "references" in manifest.tables:
            for row in matching(store, manifest, "references", chosen):
                shown[row["prompt_id"]]["reference"] = row["reference"]
    responses: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for manifest in evaluated:
        for row in matching(store, manifest, "evaluations", chosen):
            responses.setdefault((row["prompt_id"], row["label"]), []).append(row)
    return [
        {
            **shown[prompt],
            "responses": [
                {"label": label, "marks": [row["correct"] for row in rows], **rows[0]}
                for label in LABELS
                if (rows := sorted(responses.get((prompt, label), []), key=lambda row: row["sample_index"]))
            ],
        }
        for prompt in chosen
    ]


def draw(ids: list[str], sources: list[str], seed: int, count: int = SAMPLES) -> list[str]:
    """Ids drawn without replacement, sources in turn so that rare ones are seen too."""
    order = np.random.default_rng(seed).permutation(len(ids))
    turns: dict[str, int] = {}
    ranked = []
    for place, index in enumerate(order.tolist()):
        turn = turns[sources[index]] = turns.get(sources[index], -1) + 1
        ranked.append((turn, place, ids[index]))
    return [name for *_, name in sorted(ranked)[:count]]


def matching(store: Store, manifest: Any, table: str, prompt_ids: list[str]) -> Iterable[dict[str, Any]]:
    """A table's rows of these prompts; one part is in memory at a time."""
    for part in read_table(store, manifest, table):
        yield from part.filter(pc.is_in(part["prompt_id"], pa.array(prompt_ids, pa.string()))).to_pylist()

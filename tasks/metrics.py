"""Metrics: what held-out problems say about base, warmed-up and final student and the teacher, with intervals.

Loss: nats per reference token, lower is better. ROUGE-L: 0 to 100. Accuracy: share of correct responses, 0 to 1. Every
response counts alike in the last two; in the loss every reference token does.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kernels.bootstrap import Interval, difference_interval, mean_interval
from tasks.config.evaluate import EvaluateConfig

METRICS = ("loss", "rouge_l", "accuracy")
LABELS = ("base", "warmup", "final", "teacher")
# Measured too where a student is promoted and training did not start from it.
PROMOTED = "promoted"
# Labels that stand only where there is something: a run may have no warm-up.
OPTIONAL = ("warmup", PROMOTED)
DIFFERENCES = {f"final-{other}": ("final", other) for other in ("base", "warmup", "teacher", PROMOTED)}
EVALUATION_COLUMNS = ["label", "prompt_id", "source", "sample_index", "correct", "rouge_l", "tokens", "finish_reason"]
LOSS_COLUMNS = ["label", "prompt_id", "source", "loss", "tokens"]
# Sources reported one by one: the largest; a data set with thousands of them would hide the others.
SOURCES = 30

METRIC = pa.schema(
    [
        ("source", pa.string()),  # null: all held-out problems
        ("problems", pa.int64()),
        ("name", pa.string()),  # a label, or a paired difference
        ("metric", pa.string()),
        ("value", pa.float64()),  # null where unknown
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)

# {metric: mean, metric_ci: [low, high]}; None where unknown.
Measured = dict[str, Any]


class Habits(NamedTuple):
    """How a model writes: mean tokens of a response, and the share of responses that end by themselves."""

    tokens: float
    eos_rate: float


@dataclass
class Results:
    """What was measured: over all held-out problems, and by source."""

    metrics: dict[str, Measured]
    differences: dict[str, Measured]
    problems: int
    by_source: dict[str, "Results"] = field(default_factory=dict)
    habits: dict[str, Habits] = field(default_factory=dict)

    def known(self, metric: str) -> list[str]:
        """Labels with a value of this metric."""
        return [label for label in self.metrics if self.metrics[label][metric] is not None]


@dataclass
class Grids:
    """One array [P, S] a label and metric over the same problems in the same order, P problems by S responses (S = 1
    for the loss); NaN where unknown. Reference tokens [P] weigh the loss."""

    values: dict[tuple[str, str], NDArray]
    tokens: dict[str, NDArray]
    sources: NDArray

    @property
    def labels(self) -> list[str]:
        return list(self.tokens)

    def at(self, rows: NDArray) -> "Grids":
        return Grids(
            {key: grid[rows] for key, grid in self.values.items()},
            {label: tokens[rows] for label, tokens in self.tokens.items()},
            self.sources[rows],
        )


def measure(evaluations: pa.Table, losses: pa.Table, evaluate: EvaluateConfig, seed: int) -> Results:
    """All metrics of tables with EVALUATION_COLUMNS and LOSS_COLUMNS, which may be empty; row order does not matter."""
    grids = to_grids(evaluations, losses)
    results = summarise(grids, evaluate, seed)
    names, counts = np.unique(grids.sources, return_counts=True)
    if len(names) > 1:
        for name in names[np.argsort(-counts, kind="stable")][:SOURCES].tolist():
            results.by_source[name] = summarise(grids.at(grids.sources == name), evaluate, seed)
    results.habits = habits(evaluations)
    return results


def habits(evaluations: pa.Table) -> dict[str, Habits]:
    """By label, of those that were evaluated."""
    ended = pc.equal(evaluations["finish_reason"], "stop").cast(pa.float64())
    means = (
        evaluations.append_column("ended", ended).group_by("label").aggregate([("tokens", "mean"), ("ended", "mean")])
    )
    return {row["label"]: Habits(row["tokens_mean"], row["ended_mean"]) for row in means.to_pylist()}


def summarise(grids: Grids, evaluate: EvaluateConfig, seed: int) -> Results:
    """Means and paired differences of all labels over the problems of `grids`."""
    options: dict[str, Any] = {"resamples": evaluate.bootstrap, "confidence": evaluate.confidence, "seed": seed}

    def weights(label: str, metric: str) -> NDArray | None:
        return grids.tokens[label] if metric == "loss" else None

    metrics, differences = {}, {}
    for label in grids.labels:
        metrics[label] = measured(
            {m: mean_interval(grids.values[label, m], weights=weights(label, m), **options) for m in METRICS}
        )
    for name, (new, old) in DIFFERENCES.items():
        if old not in grids.labels:
            continue
        differences[name] = measured(
            {
                m: difference_interval(grids.values[new, m], grids.values[old, m], weights=weights(new, m), **options)
                for m in METRICS
            }
        )
    return Results(metrics, differences, problems=len(grids.sources))


def measured(intervals: dict[str, Interval]) -> Measured:
    """Intervals as plain JSON values."""
    row: Measured = {}
    for metric, (mean, low, high) in intervals.items():
        row[metric] = None if np.isnan(mean) else mean
        row[f"{metric}_ci"] = None if np.isnan(low) else [low, high]
    return row


def to_grids(evaluations: pa.Table, losses: pa.Table) -> Grids:
    """The two tables as arrays over the union of their problems, ordered by prompt id."""
    ids, labels = _strings(evaluations, "prompt_id"), _strings(evaluations, "label")
    loss_ids, loss_labels = _strings(losses, "prompt_id"), _strings(losses, "label")
    problems, first = np.unique(np.concatenate([ids, loss_ids]), return_index=True)
    sources = np.concatenate([_strings(evaluations, "source"), _strings(losses, "source")])[first]
    marks = {
        metric: evaluations[name].cast(pa.float64()).to_numpy()
        for metric, name in (("accuracy", "correct"), ("rouge_l", "rouge_l"))
    }
    # The same draw of every model stands in the same column: differences are paired.
    column = evaluations["sample_index"].to_numpy()
    row, loss_row = np.searchsorted(problems, ids), np.searchsorted(problems, loss_ids)
    width = 1 + int(column.max(initial=0))

    values, tokens = {}, {}
    for label in (*LABELS, PROMOTED):
        if label in OPTIONAL and label not in labels:
            continue
        at = labels == label
        for metric, mark in marks.items():
            values[label, metric] = _filled((len(problems), width), (row[at], column[at]), mark[at])
        at = loss_labels == label
        place = (loss_row[at], 0)
        values[label, "loss"] = _filled((len(problems), 1), place, losses["loss"].to_numpy()[at])
        count = _filled((len(problems), 1), place, losses["tokens"].cast(pa.float64()).to_numpy()[at])
        tokens[label] = np.nan_to_num(count[:, 0])
    return Grids(values, tokens, sources)


def _strings(table: pa.Table, column: str) -> NDArray:
    return table[column].to_numpy().astype(np.str_)


def _filled(shape: tuple[int, int], place: Any, values: NDArray) -> NDArray:
    grid = np.full(shape, np.nan)
    grid[place] = values
    return grid


def as_table(results: Results) -> pa.Table:
    """All of it as METRIC rows, for queries over many runs."""
    rows = []
    parts: list[tuple[str | None, Results]] = [(None, results), *results.by_source.items()]
    for source, part in parts:
        for name, row in {**part.metrics, **part.differences}.items():
            for metric in METRICS:
                low, high = row[f"{metric}_ci"] or (None, None)
                value = {"metric": metric, "value": row[metric], "low": low, "high": high}
                rows.append({"source": source, "problems": part.problems, "name": name, **value})
    return pa.Table.from_pylist(rows, schema=METRIC)

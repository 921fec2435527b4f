"""Plots of the report: each function puts marks on axes it is given, so that page and overview picture share them."""

from collections import Counter
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from kernels.calibration import reliability, wilson
from tasks.canvas import COLORS
from tasks.config.methods import ExponentialDecay
from tasks.metrics import Results
from tasks.verdict import NAMES, SHOWN

# Points of one curve: more than the pixels they would fall on only make the page heavy.
POINTS = 400
BINS = 20


def dots(ax: Axes, results: Results, metric: str) -> None:
    """One metric: each model's mean and interval on a line of its own."""
    shown, labels = SHOWN[metric], results.known(metric)
    for row, label in enumerate(labels):
        mean, bounds = (results.metrics[label][key] for key in (metric, f"{metric}_ci"))
        value = shown.factor * mean
        low, high = [shown.factor * bound for bound in bounds] if bounds else (value, value)
        ax.plot([low, high], [row, row], color=COLORS[label], linewidth=3, alpha=0.45)
        ax.plot(value, row, "o", color=COLORS[label], markersize=7)
        ax.annotate(shown.number(mean), (value, row), (0, 7), textcoords="offset points", ha="center")
    ax.set_yticks(range(len(labels)), [NAMES[label] for label in labels], color=COLORS["ink"])
    ax.set_ylim(len(labels) - 0.5, -0.7)
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.margins(x=0.14)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.set_xlabel(f"{shown.unit}, {'lower' if metric == 'loss' else 'higher'} is better")


# Kinds of answer: whether it is correct, as they are called, and their colour.
KINDS = {True: ("correct", "final"), False: ("incorrect", "wrong"), None: ("not known", "base")}
# Prompts by (number of unique answers, whether the majority answer is correct).
Counts = Counter[tuple[int, bool | None]]


def split(correct: NDArray) -> list[tuple[str, str, NDArray]]:
    """(name, colour, mask) of the kinds of answer that occur; `correct` holds 1, 0 and NaN for unknown."""
    masks = {True: correct == 1, False: correct == 0, None: np.isnan(correct)}
    return [(*KINDS[kind], mask) for kind, mask in masks.items() if mask.any()]


def unique_answers(ax: Axes, prompts: Counts) -> None:
    """Prompts by their number of unique answers, stacked by whether the majority answer is correct."""
    numbers = range(1, max(unique for unique, _ in prompts) + 1)
    below = np.zeros(len(numbers))
    for kind, (name, color) in KINDS.items():
        counts = np.array([prompts[unique, kind] for unique in numbers])
        if counts.any():
            ax.bar(numbers, counts, 0.72, bottom=below, color=COLORS[color], label=name)
        below += counts
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    ax.set_xlabel("Unique final answers among the samples of a prompt")
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_ylabel("Prompts, by majority answer")
    key(ax)


def accuracy_by_unique(ax: Axes, prompts: Counts) -> None:
    """Share of correct majority answers by the number of unique answers, with 95 % Wilson intervals."""
    for count in sorted({unique for unique, correct in prompts if correct is not None}):
        right = prompts[count, True]
        known = right + prompts[count, False]
        low, high = wilson(right, known)
        ax.plot([count, count], [low, high], color=COLORS["final"], linewidth=3, alpha=0.45)
        ax.plot(count, right / known, "o", color=COLORS["final"], markersize=7, clip_on=False)
        ax.annotate(f"{right / known:.0%}", (count, right / known), (9, -3), textcoords="offset points")
    top = max(unique for unique, _ in prompts)
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    ax.set_xlim(0.5, top + 0.7)
    ax.set_xlabel("Unique final answers among the samples of a prompt")
    shares(ax, "Majority answers that are correct")


def key(ax: Axes) -> None:
    """The legend in one line above the axes, where no data is."""
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.1, handlelength=1.2, columnspacing=1.3)


def shares(ax: Axes, label: str) -> None:
    """A y axis from 0 to 100 %."""
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set_ylabel(label)


def confidence(ax: Axes, confidences: NDArray, correct: NDArray) -> None:
    """Histogram of the TA's confidence, correct and incorrect answers over each other."""
    edges = np.linspace(0, 1, BINS + 1)
    for name, color, mask in split(correct):
        counts, _ = np.histogram(confidences[mask], edges)
        ax.stairs(counts, edges, fill=True, color=COLORS[color], alpha=0.28)
        ax.stairs(counts, edges, color=COLORS[color], linewidth=1.4, label=f"{name} ({mask.sum():,})")
    ax.set_xlim(0, 1)
    ax.set_xlabel("TA's confidence in the answer")
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_ylabel(f"Answers per {1 / BINS:g}")
    key(ax)


def calibration(ax: Axes, answers: dict[str, tuple[NDArray, NDArray]]) -> None:
    """Share correct against confidence in ten bins, with 95 % Wilson intervals; honest on the diagonal."""
    ax.plot([0, 1], [0, 1], color=COLORS["muted"], linewidth=1, linestyle=(0, (3, 3)))
    for (name, (confidences, correct)), color, marker in zip(
        answers.items(), ("final", "teacher", "warmup"), "osD", strict=False
    ):
        bins = reliability(confidences, correct)
        at = bins.counts > 0
        style: dict[str, Any] = {"markersize": 6, "color": COLORS[color], "linestyle": "-", "clip_on": False}
        ax.plot(bins.confidence[at], bins.accuracy[at], marker, label=name, **style)
        for count, x, share in zip(bins.counts[at], bins.confidence[at], bins.accuracy[at], strict=True):
            ax.plot([x, x], wilson(round(share * count), int(count)), color=COLORS[color], linewidth=3, alpha=0.35)
    ax.set_xlim(0, 1)
    ax.set_xlabel("TA's confidence in the answer, mean of a tenth")
    shares(ax, "Answers that are correct")
    key(ax)


def thin(values: NDArray, points: int = POINTS) -> tuple[NDArray, NDArray]:
    """(steps, means) of at most `points` runs of equal length; steps count from 1. Runs of NaN only stay NaN."""
    run = max(1, -(-len(values) // points))
    starts = np.arange(0, len(values), run)
    known = ~np.isnan(values)
    counts = np.add.reduceat(known.astype(float), starts) if len(values) else np.array([])
    sums = np.add.reduceat(np.where(known, values, 0), starts) if len(values) else np.array([])
    with np.errstate(invalid="ignore"):
        return np.minimum(starts + (run + 1) / 2, len(values)), sums / counts


def smooth(values: NDArray) -> NDArray:
    """A centred running mean over a fifteenth of the curve, over what is known."""
    half = max(1, len(values) // 30)
    known = ~np.isnan(values)
    kernel = np.ones(2 * half + 1)
    counts = np.convolve(known, kernel, "full")[half : half + len(values)]
    sums = np.convolve(np.where(known, values, 0), kernel, "full")[half : half + len(values)]
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def curve(ax: Axes, values: NDArray, color: str, label: str) -> None:
    """Each step faintly, their running mean on top."""
    steps, means = thin(values)
    ax.plot(steps, means, color=COLORS[color], linewidth=0.8, alpha=0.35)
    ax.plot(steps, smooth(means), color=COLORS[color], label=label)


def training(axes: Any, steps: dict[str, NDArray], start: float | None, best: int | None) -> None:
    """Loss and validation loss over steps; below them, small, the learning rate."""
    top, bottom = axes
    curve(top, steps["loss"], "final", "training loss")
    at = np.flatnonzero(~np.isnan(steps["validation_loss"]))
    x, y = at + 1, steps["validation_loss"][at]
    if start is not None:
        x, y = np.append(0, x), np.append(start, y)
    if len(x):
        top.plot(x, y, "o-", color=COLORS["warmup"], markersize=4, label="validation loss")
    if best is not None and best in x:
        value = y[np.flatnonzero(x == best)[0]]
        top.plot(best, value, "o", markersize=10, markerfacecolor="none", markeredgecolor=COLORS["ink"])
        side = "right" if best > len(steps["loss"]) / 2 else "left"
        top.annotate(f"kept: step {best:,}", (best, value), (0, 9), textcoords="offset points", ha=side)
    top.set_ylabel("Nats per response token")
    top.set_ylim(bottom=min(0, top.get_ylim()[0]))
    key(top)
    bottom.plot(*thin(steps["learning_rate"]), color=COLORS["muted"], linewidth=1.2)
    bottom.set_ylim(bottom=0)
    bottom.yaxis.set_major_locator(MaxNLocator(2))
    bottom.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    bottom.set_ylabel("Learning\nrate")
    bottom.set_xlabel("Optimiser step")


def interventions(axes: Any, positions: dict[str, NDArray], gate: ExponentialDecay | None) -> None:
    """Share of tokens the teacher wrote by response position, and the gate's threshold; below, how many there were."""
    top, bottom = axes
    emitted = positions["emitted"]
    reached = int(np.flatnonzero(emitted).max(initial=-1)) + 1
    x, emitted = positions["position"][:reached], emitted[:reached]
    rate = positions["interventions"][:reached] / np.maximum(emitted, 1)
    agreeing = positions["agreeing"][:reached] / np.maximum(emitted, 1)
    top.fill_between(x, rate, step="mid", color=COLORS["teacher"], alpha=0.18, linewidth=0)
    top.step(x, rate, where="mid", color=COLORS["teacher"], label="teacher decides")
    top.step(x, agreeing, where="mid", color=COLORS["second"], linewidth=1.2, label="and agrees")
    if gate:
        threshold = np.maximum(gate.floor, gate.initial * np.exp(-gate.rate * x))
        top.plot(x, threshold, color=COLORS["ink"], linewidth=1.2, linestyle=(0, (4, 3)), label="threshold τ")
    shares(top, "Share of tokens")
    key(top)
    bottom.fill_between(x, emitted, step="mid", color=COLORS["base"], alpha=0.45, linewidth=0)
    bottom.set_ylim(bottom=0)
    bottom.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    bottom.set_ylabel("Tokens\nwritten")
    bottom.set_xlabel("Response position (tokens)")


def rollouts(axes: Any, steps: dict[str, NDArray]) -> None:
    """Length of rollouts over steps; below, how many ended by themselves and how often the teacher decided."""
    top, bottom = axes
    curve(top, steps["response_length"], "final", "mean length")
    top.set_ylim(bottom=0)
    top.set_ylabel("Tokens a rollout")
    curve(bottom, steps["eos_rate"], "warmup", "end by themselves")
    curve(bottom, steps["intervention_rate"], "teacher", "tokens by the teacher")
    shares(bottom, "Share")
    bottom.set_yticks([0, 0.5, 1])
    key(bottom)
    bottom.set_xlabel("Optimiser step")

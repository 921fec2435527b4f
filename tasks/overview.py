"""The overview: one picture of a run, for a README or a dashboard that shows no HTML."""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tasks import plots
from tasks.accounts import Level
from tasks.canvas import COLORS, STYLE
from tasks.metrics import METRICS, Results

# Inches and dots an inch: 1800 by 1050 pixels.
SIZE, DPI = (12, 7), 150


def funnel(ax: Axes, levels: list[Level]) -> None:
    """Rows at each level; the warm-up's share in its own colour."""
    names = [level.name for level in levels]
    for row, level in enumerate(levels):
        ax.barh(row, level.rows, 0.62, color=COLORS["final"])
        ax.barh(row, level.warmup, 0.62, color=COLORS["warmup"])
        ax.annotate(f"{level.rows:,}", (level.rows, row), (5, -3), textcoords="offset points")
    ax.set_yticks(range(len(levels)), names, color=COLORS["ink"])
    ax.set_ylim(len(levels) - 0.4, -0.6)
    ax.set_xlim(0, 1.18 * max(level.rows for level in levels))
    ax.set_xlabel("Rows (orange: by way of the warm-up)")
    ax.grid(visible=False)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)


def draw(path: Path, heading: str, text: str, results: Results, levels: list[Level], panels: list[Any]) -> None:
    """Write the PNG: the verdict, held-out results, the funnel, and ``panels`` as (title, draw function, data…)."""
    metrics = [metric for metric in METRICS if results.known(metric)]
    with matplotlib.rc_context({**STYLE, "figure.facecolor": COLORS["paper"], "savefig.facecolor": COLORS["paper"]}):
        figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        top, middle, bottom = figure.subfigures(3, height_ratios=[0.62, 1.05, 1.5])
        top.text(0.012, 0.72, heading, fontsize=19, fontweight="bold", va="center")
        top.text(0.012, 0.42, textwrap.fill(text, 150), fontsize=10, va="top", color=COLORS["muted"])
        if metrics:
            axes = middle.subplots(ncols=len(metrics), sharey=True)
            plots.dots(axes, results)
            np.atleast_1d(axes)[0].set_title("Held-out results, with intervals")
        drawn: list[Any] = [("Where rows went", funnel, levels)] if levels else []
        drawn += panels[: 3 - len(drawn)]
        for ax, (title, panel, *data) in zip(np.atleast_1d(bottom.subplots(ncols=max(1, len(drawn)))), drawn, strict=False):
            panel(ax, *data)
            ax.set_title(title)
        figure.savefig(path, metadata={"Software": None})

"""The overview: one picture of a run, for a README or a dashboard that shows no HTML."""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tasks.accounts import Level
from tasks.canvas import COLORS, STYLE
from tasks.findings import Finding, finding

# Inches, dots an inch, and panels in a row.
SIZE, DPI, PANELS = (14, 8), 130, 3


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


def draw(path: Path, heading: str, text: str, levels: list[Level], upper: list[Finding], lower: list[Finding]) -> None:
    """Write the PNG: heading and text, a row of findings, the funnel of rows, and as many more as have room."""
    funnels = [finding("Where rows went", "", funnel, levels)] if levels else []
    with matplotlib.rc_context({**STYLE, "figure.facecolor": COLORS["paper"], "savefig.facecolor": COLORS["paper"]}):
        figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
        strips: Any = figure.subfigures(3, height_ratios=[0.5, 1.1, 1.65], hspace=0.03)
        strips[0].text(0.006, 0.72, heading, fontsize=19, fontweight="bold", va="center")
        strips[0].text(0.006, 0.45, textwrap.fill(text, 150), fontsize=10, va="top", color=COLORS["muted"])
        for strip, found in ((strips[1], upper), (strips[2], [*funnels, *lower])):
            for place, panel in zip(strip.subfigures(1, PANELS, wspace=0.03), found, strict=False):
                panel.draw(place.subplots(**panel.layout), *panel.data)
                place.suptitle(panel.title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
        figure.savefig(path, metadata={"Software": None}, bbox_inches="tight", pad_inches=0.3)

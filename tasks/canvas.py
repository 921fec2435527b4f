"""The canvas of the report's plots: one style, and SVG that follows the page's light and dark colours.

Colours are the Okabe-Ito palette's (told apart without colour vision). Text in plots is fixed: no prompt, no name.
"""

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Each colour is a CSS variable of the page, and what it is in a picture without one.
COLORS = {
    "ink": "#1f2329",
    "muted": "#5c6570",
    "line": "#d5d9de",
    "paper": "#ffffff",
    "base": "#7d8590",
    "warmup": "#e69f00",
    "promoted": "#8b5fbf",
    "final": "#0072b2",
    "teacher": "#009e73",
    "wrong": "#d55e00",
    "second": "#cc79a7",
}
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,
    "text.color": COLORS["ink"],
    "axes.edgecolor": COLORS["line"],
    "axes.facecolor": "none",
    "axes.labelcolor": COLORS["muted"],
    "axes.labelsize": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLORS["line"],
    "grid.linewidth": 0.6,
    "xtick.color": COLORS["line"],
    "ytick.color": COLORS["line"],
    "xtick.labelcolor": COLORS["muted"],
    "ytick.labelcolor": COLORS["muted"],
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
}


def svg(draw: Callable[..., None], *data: Any, name: str, size: tuple[float, float], layout: dict[str, Any]) -> str:
    """What ``draw(axes, *data)`` draws, as an <svg> element whose colours are the page's variables.

    ``layout`` goes to ``Figure.subplots``; ``name`` keeps the ids of several figures in one page apart. Inches.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots(**layout), *data)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # The page's own style must stay: matplotlib's would hold for the whole document. So must its font.
    text = re.sub(
        r"<defs>\s*<style.*?</style>\s*</defs>|<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL
    )
    text = re.sub(r"font-family: '[^']*'", "font-family: var(--font)", text)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    for variable, color in COLORS.items():
        text = text.replace(color, f"var(--{variable})")
    return text.replace("xlink:href", "href")

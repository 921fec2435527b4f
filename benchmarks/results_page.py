"""docs/results.md and its plots, made from the committed result files and nothing else."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.gains import Found
from benchmarks.grid import BATCH, BUDGET, METHOD, SIGNALS, SMALL_WARMUP, STEPS, WARMUP_STEPS, Arm, grid
from benchmarks.real_text import FIRST, SIZES
from tasks.canvas import COLORS, STYLE

DOCS = Path(__file__).parent.parent / "docs"
TARGET = 0.2079


def percent(value: float | None, signed: bool = False) -> str:
    return "–" if value is None else f"{100 * value:{'+' if signed else ''}.1f}"


def bounds(interval: list[float] | None) -> str:
    return "–" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def label(arm: Arm) -> str:
    gate = "" if arm.method != METHOD or arm.gate == "decay-1/10" else f", {arm.gate}"
    return f"`{arm.method}`{gate}"


def arms(summary: dict[str, Any]) -> str:
    """Every arm that has cells."""
    order = {cell.arm: place for place, cell in enumerate(grid())}
    tasks = sorted({task for row in summary["arms"] for task in row["tasks"]})
    rows = []
    for name, found in summary["start"].items():
        mean = sum(found.values()) / len(found)
        rows.append([name, "", "", "", percent(mean), "", *(percent(found[task]) for task in tasks), "", "", ""])
    for row in sorted(summary["arms"], key=lambda row: order.get(row["arm"], len(order))):
        rows.append(
            [
                label(row["arm"]),
                row["arm"].signals,
                str(row["arm"].budget),
                str(len(row["seeds"])),
                percent(row["accuracy"]),
                bounds(row["interval"]),
                *(percent(row["tasks"][task]) for task in tasks),
                percent(row["intervention_rate"]),
                "" if row["published"] is None else f"{100 * row['published']:.0f}",
                f"{row['teacher_tokens']:,.0f}" if row["teacher_tokens"] is not None else "–",
            ]
        )
    head = ["method", "signals", "queries", "seeds", "accuracy, %", "95 % interval", *tasks]
    return table([*head, "teacher decides, %", "in SWITCH's paper, %", "teacher tokens"], rows)


def comparisons(found: dict[str, Any], signed: str) -> str:
    rows = [
        [
            *(name, percent(result["value"], signed=True), bounds(result["interval"]), str(len(result["seeds"]))),
            f"{result['tokens']:.2f}",
        ]
        for name, result in found.items()
        if result
    ]
    head = ["", signed, "95 % interval", "seeds", "teacher tokens, of the other's"]
    return table(head, rows) if rows else "No cells yet."


def equal_tokens(found: dict[int, dict[str, Any] | None]) -> str:
    """The gain of all signals where no signals have as many teacher tokens."""
    rows = []
    for budget, result in found.items():
        if result:
            less, more = result["budgets"]
            figures = [percent(result["value"], signed=True), bounds(result["interval"]), str(len(result["seeds"]))]
            rows.append([str(budget), f"{result['tokens']:,}", f"{less} and {more}", *figures])
        else:
            rows.append([str(budget), "–", "no cells on either side", "–", "–", "–"])
    return table(["queries", "teacher tokens", "none, queries", "gain", "95 % interval", "seeds"], rows)


def real(rows: list[dict[str, Any]]) -> str:
    """Signals on real text, by data set and metric."""
    names = {"rouge_l": "ROUGE-L", "loss": "response loss, nats"}
    lines = []
    for row in rows:
        figures = [f"{row[name]:.2f}" for name in ("base", "teacher", "none", "all")]
        low, high = row["interval"]
        tokens = row["teacher_tokens"]["all"] / row["teacher_tokens"]["none"]
        gap = [f"{row['difference']:+.2f}", f"{low:.2f} to {high:.2f}", str(len(row["seeds"])), f"{tokens:.2f}"]
        lines.append([row["data"], names[row["metric"]], *figures, *gap])
    head = ["data", "metric", "student before", "teacher", "no signals", "all signals", "difference", "95 % interval"]
    return table([*head, "seeds", "teacher tokens, of the other's"], lines)


def verdicts(summary: dict[str, Any]) -> list[str]:
    """What was aimed at, and what came of it."""
    gain, lead = summary["signals_relative_gain"], summary["switch_minus_best_other"]
    reached = summary["tasks_at_or_above_teacher"]
    lines = []
    if gain is not None:
        low, high = summary["signals_gain_interval"]
        met = "met" if gain >= TARGET and low > 0 else "missed"
        lines.append(
            f"All signals with two stages against none: {percent(gain, True)} % relative ({100 * low:.1f} to "
            f"{100 * high:.1f}); aimed at {100 * TARGET:.2f} % with an interval above 0: {met}."
        )
        others = {"at equal teacher tokens": summary["at_equal_tokens"].get(BUDGET)}
        others["against plain fine-tuning"] = summary["against_fine_tuning"]
        lines += [
            f"The same {name}: {percent(found['value'], True)} % ({bounds(found['interval'])})."
            for name, found in others.items()
            if found
        ]
    if lead is not None:
        low, high = summary["switch_interval"]
        met = "met" if low > 0 else "missed"
        lines.append(
            f"SWITCH minus the best other method ({summary['best_other']}): {percent(lead, True)} points "
            f"({100 * low:.1f} to {100 * high:.1f}); aimed at an interval above 0: {met}."
        )
    if length := summary["by_length"]:
        short, long = length[0], length[-1]
        grows = len(length) > 1 and all(one["lead"] < other["lead"] for one, other in pairwise(length))
        lines.append(
            f"Its lead by answers' length: {percent(short['lead'], True)} points at {short['tokens']:.0f} tokens, "
            f"{percent(long['lead'], True)} at {long['tokens']:.0f}; aimed at one that grows: "
            f"{'met' if grows else 'missed'}."
        )
    if reached is not None:
        lines.append(
            f"Tasks where some arm's mean is at or above its teacher's: {reached}; aimed at one. Means without "
            "a test: on a task whose teacher is little better than the untrained student it is chance."
        )
    seconds = sorted(row["seconds"] for row in summary["arms"] if row["seconds"])
    if seconds:
        lines.append(
            f"Seconds a cell, means of arms: {seconds[0]:.0f} to {seconds[-1]:.0f}; aimed at 90: "
            f"{'met' if seconds[-1] <= 90 else 'missed'}."
        )
    return lines


def text(found: Found, summary: dict[str, Any], on_real_text: list[dict[str, Any]] | None = None) -> str:
    """The page; ``on_real_text`` as `benchmarks.real_text.summary` has it."""
    if not found:
        return "No cells yet: python -m benchmarks.methods"
    whole, cells = len(grid()), [cell for seeds in found.values() for cell in seeds.values()]
    dates = sorted({cell["conditions"]["date"] for cell in cells})
    seconds = sorted(cell["seconds"] for cell in cells)
    loads = sorted(cell["conditions"]["load"] for cell in cells)
    length = [
        [row["task"], f"{row['tokens']:.0f}", percent(row["lead"], True), bounds(row["interval"])]
        for row in summary["by_length"]
    ]
    parts = [
        "# Results",
        "Made by `python -m benchmarks.methods --page` from `benchmarks/results/methods`, and not edited.",
        f"{len(cells)} of {whole} cells are run ({dates[0]} to {dates[-1]}, {cells[0]['conditions']['processor']}, "
        f"{cells[0]['conditions']['cores']} cores). A cell is a whole run on house models (`benchmarks/house`): "
        f"{WARMUP_STEPS} steps of warm-up and {STEPS} of training, {BATCH} sequences each, {BUDGET} teacher queries "
        f"where not said otherwise. Cells took {seconds[0]:.0f} to {seconds[-1]:.0f} s, half of them under "
        f"{seconds[len(seconds) // 2]:.0f} s, where the load was {loads[0]:.1f} to {loads[-1]:.1f} when they "
        "began; they reuse stages of earlier ones. "
        "Accuracy is the mean over tasks, on held-out problems that are the same for all cells, answers sampled at "
        "temperature 0.7. Intervals (95 %) resample problems and seeds; an arm with one seed has an interval over "
        "problems only, which is too narrow.",
        "## What was aimed at",
        "\n".join(f"- {line}" for line in verdicts(summary)) or "Nothing can be said yet.",
        "## All arms",
        arms(summary),
        "Teacher tokens are those read and written for annotations, and the positions of rollouts that the teacher was "
        "asked about. What it read of annotated rows in training is not counted: all that `kd` asks of it, and a part "
        "of what each method asks that mixes annotated rows in.",
        "![Accuracy by arm](results-arms.png)",
        "## Signals",
        f"Relative gain over no signals (queries at random, every annotation kept), `{METHOD}`, %. `one-stage` has "
        "all signals, read of the student as it comes, and no warm-up, but as many steps in all; `small-warmup` has "
        f"its warm-up on {100 * SMALL_WARMUP:.0f} % of the queries, where others have 20 %; `stand-in` has all, and "
        "the student's answer in the teacher's place where the TA trusts it clearly more:",
        "![Accuracy by queries](results-budgets.png)",
        comparisons(summary["by_signals"] | {"all, against plain fine-tuning": summary["against_fine_tuning"]}, "gain"),
        *[
            part
            for budget, found_there in summary["other_budgets"].items()
            if any(found_there.values())
            for part in (f"With {budget} queries:", comparisons(found_there, "gain"))
        ],
        "All signals with two stages, the first on 20 % of the queries, minus all signals with one stage, or with a "
        "small first one, points:",
        comparisons(summary["two_stages"], "difference"),
        "All signals against none by method, relative, %:",
        comparisons(summary["signals_by_method"], "gain"),
        "Signals choose prompts whose answers are longer or shorter than others. At equal teacher tokens, by the line "
        "between those two budgets of no signals whose tokens lie on either side, or by the one that is within a "
        "hundredth of them:",
        equal_tokens(summary["at_equal_tokens"]) if summary["at_equal_tokens"] else "No cells yet.",
        "## Methods",
        "SWITCH minus another method, all signals, points. All have the learning rate that was chosen by plain "
        "fine-tuning. `sft` and `seqkd` are the same where the teacher wrote all rows, as here:",
        comparisons(summary["methods"], "lead"),
        "The same without signals, where runs stand by default:",
        comparisons(summary["without_signals"], "lead"),
    ]
    if length:
        parts += [
            "SWITCH's lead over the best other method by task, with the mean tokens of the teacher's answers:",
            table(["task", "tokens", "lead, points", "95 % interval"], length),
        ]
    if summary["gates"]:
        parts += [
            "## Thresholds of SWITCH",
            "A threshold strategy or decay minus exponential decay with rate 1/10, points:",
            comparisons(summary["gates"], "difference"),
        ]
    if on_real_text:
        parts += [
            "## Signals on real text",
            "Made by `python -m benchmarks.real_text --data FOLDER`: SmolLM2-135M-Instruct is teacher and TA, 24 of "
            f"its 30 layers are the student; {SIZES['budget.queries']} queries, {SIZES['warmup.steps']} steps of "
            f"warm-up and {SIZES['train.steps']} of training, {SIZES['train.batch_size']} sequences each, fine-tuning "
            f"on what the teacher wrote; those of the first {FIRST} held-out problems that are short enough, the same "
            "in all runs, against the source's own answers. The difference is all signals minus none.",
            real(on_real_text),
        ]
    return "\n\n".join(parts)


def dots(ax: Axes, summary: dict[str, Any]) -> None:
    """Arms with their intervals, between the untrained student and the teacher."""
    order = {cell.arm: place for place, cell in enumerate(grid())}
    rows = sorted(summary["arms"], key=lambda row: order.get(row["arm"], len(order)))
    for place, row in enumerate(rows):
        color = COLORS["final"] if row["arm"].method == METHOD else COLORS["base"]
        if row["interval"]:
            ax.plot([100 * bound for bound in row["interval"]], [place, place], color=color, linewidth=3, alpha=0.45)
        ax.plot(100 * row["accuracy"], place, "o", color=color)
    for name, found in summary["start"].items():
        mean = 100 * sum(found.values()) / len(found)
        ax.axvline(mean, color=COLORS["teacher" if name == "teacher" else "muted"], linestyle="--", linewidth=1)
        ax.annotate(
            name, (mean, -0.8), ha="center", fontsize=8.5, bbox={"facecolor": "white", "linewidth": 0, "pad": 2}
        )
    names = [f"{label(row['arm']).replace('`', '')} · {row['arm'].signals} · {row['arm'].budget}" for row in rows]
    ax.set_yticks(range(len(rows)), names)
    ax.set_ylim(len(rows) - 0.4, -1.2)
    ax.set_xlabel("accuracy, %")


def lines(ax: Axes, summary: dict[str, Any]) -> None:
    """Accuracy by queries, a line for each choice of signals; bars are intervals."""
    colors = [COLORS[name] for name in ("final", "base", "warmup", "wrong", "teacher", "muted", "second")]
    for name, marker, aside, color in zip(SIGNALS, "os^vD*P", (-5, 5, -15, 15, -10, 10, 0), colors, strict=True):
        rows = [row for row in summary["arms"] if row["arm"] == Arm(signals=name, budget=row["arm"].budget)]
        rows.sort(key=lambda row: row["arm"].budget)
        heights, places = [100 * row["accuracy"] for row in rows], [row["arm"].budget + aside for row in rows]
        bounds = [[100 * abs(row["interval"][end] - row["accuracy"]) for row in rows] for end in (0, 1)]
        ax.errorbar(places, heights, bounds, marker=marker, color=color, label=name, linewidth=1.4, elinewidth=0.8)
    ax.set_xlabel("teacher queries")
    ax.set_ylabel("accuracy, %")
    ax.legend(title="signals", ncols=2)


def picture(draw: Callable[..., None], summary: dict[str, Any], path: Path, size: tuple[float, float]) -> None:
    with matplotlib.rc_context({**STYLE, "figure.facecolor": COLORS["paper"], "savefig.facecolor": COLORS["paper"]}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots(), summary)
        figure.savefig(path, dpi=120, metadata={"Software": None})


def write(
    found: Found, summary: dict[str, Any], on_real_text: list[dict[str, Any]] | None = None, folder: Path = DOCS
) -> None:
    (folder / "results.md").write_text(text(found, summary, on_real_text) + "\n")
    if found:
        picture(dots, summary, folder / "results-arms.png", (7.0, 1.3 + 0.28 * len(found)))
        picture(lines, summary, folder / "results-budgets.png", (7.0, 4.2))

"""Tables for the terminal."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from flows.artifacts import BUDGET_COLUMNS, budget_rows, duration, metric_rows
from flows.plan import Plan
from infra.manifest import Manifest
from tasks.accounts import Account
from tasks.value import KEYS

# Facts of stages that are long or shown elsewhere.
ELSEWHERE = {"models", "metrics", "differences", "verdict", "report", "student", "promoted", "gate", "quality_for_cost"}
ELSEWHERE |= {"charged", "charged_in_all", "spent", "spent_in_all", "paid"}


def metrics_table(metrics: dict[str, Any]) -> Table:
    table = Table(title="held-out problems", title_justify="left")
    rows = metric_rows(metrics)
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    return table


def stages_table(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['run']}: {result['state']} in {result['seconds']} s", title_justify="left")
    for name in ("stage", "fingerprint", "seconds", "rows"):
        table.add_column(name, justify="right" if name == "seconds" else "left")
    for stage in result["stages"]:
        rows = ", ".join(f"{count:,} {name}" for name, count in stage["rows"].items())
        seconds = "reused" if stage["reused"] else str(stage["seconds"])
        table.add_row(stage["name"], stage["fingerprint"], seconds, rows)
    return table


def facts_table(manifests: dict[str, Manifest]) -> Table:
    table = Table(title="signals and accounting", title_justify="left")
    for name in ("stage", "fact", "value"):
        table.add_column(name)
    for stage, manifest in manifests.items():
        for name, value in manifest.facts.items():
            if name not in ELSEWHERE and value is not None:
                table.add_row(
                    stage, name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else escape(str(value))
                )
    return table


def plan_table(plan: Plan) -> Table:
    table = Table(
        title=escape(f"{plan.run} in {plan.root}"),
        title_justify="left",
        caption=escape(plan.summary),
        caption_justify="left",
    )
    for name in ("stage", "fingerprint", "state", "rows", "tokens", "estimate"):
        table.add_column(name, justify="right" if name in ("rows", "tokens", "estimate") else "left")
    for stage in plan.stages:
        state = "done" if stage.done else "to do"
        seconds = "" if stage.done or stage.seconds is None else duration(stage.seconds)
        table.add_row(stage.name, stage.fingerprint, state, f"{stage.rows:,}", f"{stage.tokens:,}", seconds)
    return table


def checks_table(checks: dict[str, list[str]]) -> Table:
    """What was looked at, and what is lacking."""
    table = Table("", "check", "what is lacking, and the fix")
    for name, lines in checks.items():
        table.add_row("[red]✗[/]" if lines else "[green]✓[/]", name, "\n".join(map(escape, lines)))
    return table


def comparison_table(rows: list[dict[str, Any]]) -> Table:
    """Runs as columns: a line is read across them."""
    table = Table(title="runs side by side", title_justify="left")
    table.add_column("")
    for row in rows:
        table.add_column(row["run"], justify="right")
    for key in ("state", "method", "steps", "queries", "teacher_tokens", "money", "device_hours", "seconds"):
        if any(row[key] is not None for row in rows):
            unit = row_currency(rows) if key == "money" else ""
            table.add_row(key.replace("_", " ") + unit, *(written(row[key]) for row in rows))
    for metric in ("loss", "rouge_l", "accuracy"):
        table.add_section()
        table.add_row(metric, *(written(row[metric]) for row in rows))
        table.add_row("  interval", *(" to ".join(map(written, row[f"{metric}_ci"] or [])) for row in rows))
        for key in KEYS:
            if any(row[f"{metric}_{key}"] is not None for row in rows):
                unit = row_currency(rows) if key == "per_money" else ""
                name = f"  gain {key.replace('_', ' ')}{unit}"
                table.add_row(name, *(written(row[f"{metric}_{key}"]) for row in rows))
    return table


def row_currency(rows: list[dict[str, Any]]) -> str:
    """The currencies that money is counted in."""
    return f" ({', '.join(sorted({row['currency'] for row in rows if row['currency']}))})"


def budget_table(accounts: list[Account]) -> Table:
    """The budget: charged once a query; sent: with all that was sent again."""
    table = Table(title="teacher budget", title_justify="left")
    for name in ("", *BUDGET_COLUMNS):
        table.add_column(name, justify="right" if name else "left")
    for row in budget_rows(accounts):
        table.add_row(row["unit"], *("" if row[name] is None else f"{row[name]:,}" for name in BUDGET_COLUMNS))
    return table


def choices_table(rows: list[dict[str, Any]]) -> Table:
    """``flows.compare.choices`` as a table."""
    said = []
    if all(row["shared"] in (None, row["prompts"]) for row in rows):
        said += ["every candidate was selected: with more of them (signals.candidates) ways to select differ"]
    said += [f"{row['signal']}: {row['note']}" for row in rows if row["note"]]
    table = Table(
        title="what each signal would have selected, and what that would be charged",
        title_justify="left",
        caption=escape("\n".join(said)),
        caption_justify="left",
    )
    table.add_column("signal")
    priced = any(row["money"] is not None for row in rows)
    names = ["prompts", "as selected", "known to be wrong", "unique answers", "TA's confidence"]
    for name in [*names, "queries", "teacher tokens", *(["money"] if priced else [])]:
        table.add_column(name, justify="right")
    for row in rows:
        shared = "" if row["shared"] is None else f"{row['shared']} of {row['prompts']}"
        wrong = f"{row['known_wrong']} of {row['known']}" if row["known"] else ""
        values = [row["mean_unique_answers"], row["mean_ta_student"], row["queries"], row["teacher_tokens"]]
        values += [row["money"]] if priced else []
        table.add_row(row["signal"], written(row["prompts"]), shared, wrong, *map(written, values))
    return table


def written(value: Any) -> str:
    """A cell: four significant digits, nothing where nothing is known."""
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def trace_table(found: dict[str, Any]) -> Table:
    table = Table(title="where the row comes from", title_justify="left")
    for name in ("what", "column", "value"):
        table.add_column(name)
    for what, entry in found.items():
        entries = entry if isinstance(entry, list) else [entry]
        for number, row in enumerate(entries, 1):
            title = f"{what} {number}" if len(entries) > 1 else what
            for column, value in row.items() if isinstance(row, dict) else [("", row)]:
                if value is not None and not column.endswith(("token_ids", "logprobs", "distributions")):
                    table.add_row(title, column, escape(str(value)[:300]))
                    title = ""
            table.add_section()
    return table


def parity_table(found: dict[str, Any]) -> Table:
    table = Table(title="engine against training model, nats a token", title_justify="left")
    for name in ("model", "mean", "largest", "tokens"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for role, gap in found.items():
        table.add_row(role, f"{gap['mean']:.2g}", f"{gap['largest']:.2g}", str(gap["tokens"]))
    return table

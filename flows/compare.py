"""Runs side by side, and what each signal would have chosen. Read from what runs left; nothing is run again."""

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from flows.record import RunRecord
from infra.manifest import Manifest
from infra.parts import read_rows, read_table
from infra.store import Store
from tasks import value
from tasks.accounts import annotations, teacher_named, teacher_queries
from tasks.config.budget import Budget
from tasks.config.signals import Select
from tasks.metrics import METRICS

if TYPE_CHECKING:
    from tasks.ranking import Ranking


def comparison(store: Store, record: RunRecord) -> dict[str, Any]:
    """One run's line: what it did, what it cost, what came of it. None where the run is not that far."""
    manifests = record.manifests(store)
    facts = manifests["report"].facts if "report" in manifests else {}
    config, budget = record.config, Budget.model_validate(record.config["budget"])
    row: dict[str, Any] = {
        "run": record.run,
        "state": record.state,
        "method": config["train"]["method"]["type"],
        "steps": (config["warmup"]["steps"] if budget.warmup_share else 0) + config["train"]["steps"],
        "queries": teacher_queries(manifests),
        "teacher_tokens": value.teacher_tokens(manifests),
        "money": value.money(manifests, budget),
        "currency": budget.price.currency if budget.price else None,
        "device_hours": round(value.device_hours(manifests), 4),
        "seconds": round(sum(manifest.seconds for manifest in manifests.values()), 1),
    }
    final = (facts.get("metrics") or {}).get("final") or {}
    gain = (facts.get("differences") or {}).get("final-base")
    gains = value.quality_for_cost(gain, manifests, budget) if gain else {}
    for metric in METRICS:
        row[metric], row[f"{metric}_ci"] = final.get(metric), final.get(f"{metric}_ci")
        for key in value.KEYS:
            row[f"{metric}_{key}"] = gains.get(key, {}).get(metric)
    return row


# Ways to choose, as settings of ``signals.select``.
WAYS: dict[str, dict[str, Any]] = {
    "unique answers": {"rule": "signals", "assistant_weight": 0.0},
    "majority share": {"rule": "signals", "assistant_weight": 0.0, "consistency": "majority"},
    "answer entropy": {"rule": "signals", "assistant_weight": 0.0, "consistency": "entropy"},
    "TA's confidence": {"rule": "signals", "consistency_weight": 0.0},
    "both": {"rule": "signals"},
    "random": {"rule": "random"},
    "oracle": {"rule": "oracle"},
}


def choices(store: Store, record: RunRecord) -> list[dict[str, Any]]:
    """What each signal would have selected from the run's candidates with the same number of queries.

    One line a way: how many of the run's own choices it shares, how many of its choices the student is known to get
    wrong, and what their annotation would have cost, in teacher tokens read and written and in money where there are
    prices, by the mean of what was charged for each source. ValueError where the run has not selected yet.
    """
    from tasks.ranking import deciding_columns, ranking

    manifests = record.manifests(store)
    if "select" not in manifests:
        raise ValueError(f"run {record.run} has not selected prompts yet: its stage select is not done")
    queries, seed = manifests["select"].settings["queries"], manifests["select"].settings["seed"]
    ways = {way: Select(**settings) for way, settings in WAYS.items()}
    columns = sorted({name for select in ways.values() for name in deciding_columns(select)} | {"selected"})
    signals = manifests["select"].tables["signals"].arrow_schema
    schema = pa.schema([signals.field(name) for name in columns])
    by_source = costs_by_source(store, manifests, Budget.model_validate(record.config["budget"]))
    with ranking(read_table(store, manifests["select"], "signals", columns), schema, seed) as ranked:
        return [{"signal": way} | choice(ranked, select, queries, by_source) for way, select in ways.items()]


def choice(ranked: "Ranking", select: Select, queries: int, by_source: "Costs") -> dict[str, Any]:
    """What one way would have selected."""
    from tasks.ranking import SELECTED

    ranked.decide(select, queries)
    chosen = f"FROM candidates JOIN fates USING (n) WHERE fates.reason = '{SELECTED}'"
    measures = f"""
        SELECT count(*) AS queries, count(*) FILTER (selected) AS shared,
            CASE WHEN count(correct) > 0 THEN count(*) FILTER (NOT correct) END AS known_wrong,
            count(correct) AS known, avg(unique_answers) AS mean_unique_answers, avg(ta_student) AS mean_ta_student
        {chosen}
    """
    (row,) = ranked.db.execute(measures).to_arrow_table().to_pylist()
    counts = ranked.db.execute(f"SELECT source, count(*) {chosen} GROUP BY source").fetchall()
    costs = [(by_source.get(source, by_source[""]), count) for source, count in counts]
    money = [paid * count for (_, paid), count in costs if paid is not None]
    return row | {
        "teacher_tokens": round(sum(tokens * count for (tokens, _), count in costs)),
        "money": round(sum(money), 6) if money else None,
    }


# Teacher tokens and money (None without a price) of annotating one prompt, means by source; under "" over all.
Costs = dict[str, tuple[float, float | None]]


def costs_by_source(store: Store, manifests: dict[str, Manifest], budget: Budget) -> Costs:
    """What was charged for a prompt of each source; nothing before the first annotation is judged."""
    columns = ["prompt_id", "prompt_tokens", "completion_tokens"]
    judged = [manifests[name] for name in ("warmup-keep", "keep") if name in manifests]
    if not judged:
        return {"": (0.0, None)}
    charged = []
    for name in annotations(manifests):
        price = budget.price_of(teacher_named(name)[1])
        asked = read_rows(store, manifests[name], "queries", columns)
        read, written = asked["prompt_tokens"], asked["completion_tokens"]
        tokens, money = pc.add(read, written), pa.nulls(len(asked), pa.float64())
        if price:
            money = pc.divide(pc.add(pc.multiply(read, price.input), pc.multiply(written, price.output)), 1000.0)
        charged.append(pa.table({"prompt_id": asked["prompt_id"], "tokens": tokens, "money": money}))
    sums = [("tokens", "sum"), ("money", "sum")]
    by_prompt = pa.concat_tables(charged).group_by("prompt_id").aggregate(sums)
    named = pa.concat_tables(read_rows(store, each, "scores", ["prompt_id", "source"]) for each in judged)
    rows = by_prompt.filter(pc.greater(by_prompt["tokens_sum"], 0)).join(
        named.group_by(["prompt_id", "source"]).aggregate([]), "prompt_id", join_type="inner"
    )
    means = [("tokens_sum", "mean"), ("money_sum", "mean")]

    def cost(row: dict[str, Any]) -> tuple[float, float | None]:
        return row["tokens_sum_mean"] or 0.0, row["money_sum_mean"]

    found = {row["source"]: cost(row) for row in rows.group_by("source").aggregate(means).to_pylist()}
    return found | {"": cost(rows.group_by([]).aggregate(means).to_pylist()[0])}

"""Runs side by side, and what each signal would have chosen. Read from what runs left; nothing is run again."""

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from flows.record import RunRecord
from infra.manifest import Manifest
from infra.parts import read_rows, read_table
from infra.store import Store
from tasks import value
from tasks.accounts import teacher_queries
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
        "steps": config["warmup"]["steps"] + config["train"]["steps"],
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
    wrong, and what their annotation would have cost in teacher tokens, by the mean of each source. ValueError where the
    run has not selected yet.
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
    by_source = tokens_by_source(store, manifests)
    with ranking(read_table(store, manifests["select"], "signals", columns), schema, seed) as ranked:
        return [{"signal": way} | choice(ranked, select, queries, by_source) for way, select in ways.items()]


def choice(ranked: "Ranking", select: Select, queries: int, by_source: dict[str, float]) -> dict[str, Any]:
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
    tokens = sum(by_source.get(source, by_source[""]) * count for source, count in counts)
    return row | {"teacher_tokens": round(tokens)}


def tokens_by_source(store: Store, manifests: dict[str, Manifest]) -> dict[str, float]:
    """Mean tokens the teacher wrote on a prompt of each source; under "" over all, 0 before its first answer."""
    import pyarrow as pa

    parts = []
    for prefix in ("warmup-", ""):
        samples = manifests.get(f"{prefix}review") or manifests.get(f"{prefix}annotate")
        scores = manifests.get(f"{prefix}keep")
        if samples and scores:
            sized = [
                pa.table({"sample_id": part["sample_id"], "tokens": pa.compute.list_value_length(part["token_ids"])})
                for part in read_table(store, samples, "samples", ["sample_id", "token_ids"])
            ]
            named = read_rows(store, scores, "scores", ["sample_id", "source"])
            parts += [pa.concat_tables(sized).join(named, "sample_id")] if sized else []
    if not parts:
        return {"": 0.0}
    rows = pa.concat_tables(parts)
    means = rows.group_by("source").aggregate([("tokens", "mean")]).to_pylist()
    return {"": pa.compute.mean(rows["tokens"]).as_py()} | {row["source"]: row["tokens_mean"] for row in means}

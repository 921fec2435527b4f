"""Runs side by side, and what each signal would have chosen. Read from what runs left; nothing is run again."""

from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from flows.record import RunRecord
from infra.manifest import Manifest
from infra.parts import read_rows, read_table
from infra.store import Store
from tasks import schemas, value
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


CONSISTENCY: dict[str, Any] = {"rule": "signals", "consistency_weight": 1.0, "assistant_weight": 0.0}
# Ways to choose, as what each changes of the run's own ``signals.select``.
WAYS: dict[str, dict[str, Any]] = {
    "unique answers": {**CONSISTENCY, "consistency": "unique"},
    "majority share": {**CONSISTENCY, "consistency": "majority"},
    "answer entropy": {**CONSISTENCY, "consistency": "entropy"},
    "TA's confidence": {"rule": "signals", "consistency_weight": 0.0, "assistant_weight": 1.0},
    "both": {"rule": "signals"},
    "random": {"rule": "random"},
    "oracle": {"rule": "oracle"},
}
# The signal behind the teacher, which chooses no prompts.
AFTER = "TA's filter"
# What a stage charged for a prompt, and whether for answers to it.
CHARGE = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("queries", pa.int32()),
        ("tokens", pa.int64()),
        ("money", pa.float64()),  # null without a price
        ("answers", pa.bool_()),
    ]
)


class Cost(NamedTuple):
    """What prompts were charged. ``money``: None without a price."""

    queries: float
    tokens: float
    money: float | None

    def row(self) -> dict[str, Any]:
        money = None if self.money is None else round(self.money, 6)
        return {"queries": round(self.queries), "teacher_tokens": round(self.tokens), "money": money}


def ways(select: Select) -> dict[str, Select]:
    """Each way within the run's own limits on sources. ``both`` has its measure and weights too; equal weights where it
    has but one of both signals."""
    made = {way: select.model_copy(update=changes) for way, changes in WAYS.items()}
    if not (select.consistency_weight and select.assistant_weight):
        made["both"] = made["both"].model_copy(update={"consistency_weight": 1.0, "assistant_weight": 1.0})
    return made


def choices(store: Store, record: RunRecord) -> list[dict[str, Any]]:
    """What each signal would have selected from the run's candidates, as many prompts as the run selected from them.

    One line a way: how many of the run's own choices it shares, how many of its choices the student is known to get
    wrong, and what their annotation would have cost, in queries, in teacher tokens read and written and in money where
    there are prices, by the mean of what was charged for each source. The last line is the signal behind the teacher:
    what it dropped and what that had cost. Both are known once annotations are judged. ValueError where the run has
    not selected yet.
    """
    from tasks.ranking import deciding_columns, ranking

    manifests = record.manifests(store)
    if "select" not in manifests:
        raise ValueError(f"run {record.run} has not selected prompts yet: its stage select is not done")
    settings = manifests["select"].settings
    selects = ways(Select.model_validate(settings["select"]))
    columns = sorted({name for select in selects.values() for name in deciding_columns(select)} | {"selected"})
    signals = manifests["select"].tables["signals"].arrow_schema
    schema = pa.schema([signals.field(name) for name in columns])
    charged = charges(store, manifests, Budget.model_validate(record.config["budget"]))
    judged = [manifests[name] for name in ("warmup-keep", "keep") if name in manifests]
    wanted = ["prompt_id", "source", "reason"]
    empty = schemas.SCORE.empty_table().select(wanted)
    scores = pa.concat_tables([empty, *(read_rows(store, each, "scores", wanted) for each in judged)])
    by_source = costs_by_source(charged, scores)
    with ranking(read_table(store, manifests["select"], "signals", columns), schema, settings["seed"]) as ranked:
        rows = [
            {"signal": way} | choice(ranked, select, settings["queries"], by_source) | {"note": ""}
            for way, select in selects.items()
        ]
    if not judged:
        return rows
    return [*rows, dict.fromkeys(rows[0]) | after(judged[-1].settings["keep"]["rule"], charged, scores)]


def choice(ranked: "Ranking", select: Select, queries: int, by_source: dict[str, Cost]) -> dict[str, Any]:
    """What one way would have selected. ``by_source``: empty where no costs are known."""
    from tasks.ranking import SELECTED

    ranked.decide(select, queries)
    chosen = f"FROM candidates JOIN fates USING (n) WHERE fates.reason = '{SELECTED}'"
    measures = f"""
        SELECT count(*) AS prompts, count(*) FILTER (selected) AS shared,
            CASE WHEN count(correct) > 0 THEN count(*) FILTER (NOT correct) END AS known_wrong,
            count(correct) AS known, avg(unique_answers) AS mean_unique_answers, avg(ta_student) AS mean_ta_student
        {chosen}
    """
    (row,) = ranked.db.execute(measures).to_arrow_table().to_pylist()
    if not by_source:
        return row | dict.fromkeys(("queries", "teacher_tokens", "money"))
    counts = ranked.db.execute(f"SELECT source, count(*) {chosen} GROUP BY source").fetchall()
    costs = [(by_source.get(source, by_source[""]), count) for source, count in counts]
    money = [cost.money * count for cost, count in costs if cost.money is not None]
    whole = Cost(
        sum(cost.queries * count for cost, count in costs),
        sum(cost.tokens * count for cost, count in costs),
        sum(money) if money else None,
    )
    return row | whole.row()


def after(rule: str, charged: pa.Table, scores: pa.Table) -> dict[str, Any]:
    """What the TA's threshold dropped, and what that had cost: a prompt's annotations share equally in the charge for
    its answers. Nothing is said of a threshold where the run's rule has none."""
    if rule not in ("absolute", "quantile"):
        return {"signal": AFTER, "note": f"acts after the query; signals.keep.rule {rule} drops nothing by it"}
    scores = scores.filter(pc.not_equal(scores["reason"], "stand_in"))
    low = pc.equal(scores["reason"], "below_threshold").cast(pa.int64())
    prompts = scores.append_column("low", low).group_by("prompt_id").aggregate([("low", "sum"), ("low", "count")])
    answers = charged.filter(charged["answers"]).group_by("prompt_id").aggregate([("tokens", "sum"), ("money", "sum")])
    rows = prompts.filter(pc.greater(prompts["low_sum"], 0)).join(answers, "prompt_id", join_type="inner")
    share = pc.divide(rows["low_sum"].cast(pa.float64()), rows["low_count"])
    tokens, money = (pc.sum(pc.multiply(rows[name], share)).as_py() for name in ("tokens_sum", "money_sum"))
    # Each annotation was a query.
    dropped = pc.sum(low, min_count=0).as_py()
    note = f"acts after the query; its amounts are those of {dropped:,} dropped of {len(scores):,} annotations ({rule})"
    return {"signal": AFTER, "prompts": len(rows)} | Cost(dropped, tokens or 0.0, money).row() | {"note": note}


def charges(store: Store, manifests: dict[str, Manifest], budget: Budget) -> pa.Table:
    """Rows of ``CHARGE``, one for each prompt and stage that had it."""
    columns = ["prompt_id", "queries", "prompt_tokens", "completion_tokens"]
    found = [CHARGE.empty_table()]
    for name in annotations(manifests):
        stage, teacher = teacher_named(name)
        price = budget.price_of(teacher)
        asked = read_rows(store, manifests[name], "queries", columns)
        read, written = asked["prompt_tokens"], asked["completion_tokens"]
        tokens, money = pc.add(read, written), pa.nulls(len(asked), pa.float64())
        if price:
            money = pc.divide(pc.add(pc.multiply(read, price.input), pc.multiply(written, price.output)), 1000.0)
        answers = pa.repeat(not stage.endswith("auxiliary"), len(asked))
        found.append(pa.table([asked["prompt_id"], asked["queries"], tokens, money, answers], schema=CHARGE))
    return pa.concat_tables(found)


def costs_by_source(charged: pa.Table, scores: pa.Table) -> dict[str, Cost]:
    """What annotating one prompt was charged, means by source of the prompts that were asked; under "" over all. Empty
    where none was."""
    names = ("queries", "tokens", "money")
    by_prompt = charged.group_by("prompt_id").aggregate([(name, "sum") for name in names])
    rows = by_prompt.filter(pc.greater(by_prompt["queries_sum"], 0)).join(
        scores.group_by(["prompt_id", "source"]).aggregate([]), "prompt_id", join_type="inner"
    )
    if not rows.num_rows:
        return {}
    means = [(f"{name}_sum", "mean") for name in names]
    found = [*rows.group_by("source").aggregate(means).to_pylist(), *rows.group_by([]).aggregate(means).to_pylist()]
    return {row.get("source", ""): Cost(*(row[f"{name}_sum_mean"] for name in names)) for row in found}

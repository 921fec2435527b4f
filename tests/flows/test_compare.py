"""What each signal would have chosen, read from the columns that it takes, and what it would be charged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from flows.compare import AFTER, choices, ways
from flows.record import RunRecord
from flows.tables import choices_table
from infra import manifest as m
from infra import parts
from infra.store import LocalStore
from tasks import schemas
from tasks.config.signals import Select

LARGE = {"text", "majority_text", "prompt_token_ids", "token_logprobs"}
SIGNALS = [
    {
        "prompt_id": f"p{number}",
        "unique_answers": number + 1,
        "majority_share": 0.5,
        "entropy": 0.5,
        "ta_student": number / 8,
        "correct": number < 4,
        "selected": number >= 6,
    }
    for number in range(8)
]
# By prompt: those of b are twice as long, about.
QUERIES = [
    {"prompt_id": f"p{number}", "queries": 1, "prompt_tokens": 5, "completion_tokens": 10 + 10 * (number % 2)}
    for number in range(8)
]
SCORES = [{"prompt_id": f"p{number}", "source": "ab"[number % 2], "reason": "kept"} for number in range(8)]
Run = Callable[..., tuple[LocalStore, RunRecord]]


@pytest.fixture
def made(tmp_path: Path) -> Run:
    """A run that has selected two of eight prompts, with these rows and settings."""

    def stage(store: LocalStore, name: str, table: str, rows: pa.Table, **settings: Any) -> m.Manifest:
        base = {"module": "m", "version": 1, "fingerprint": "a" * 16, "inputs": {}}
        made = m.Manifest(stage=name, settings=settings, **base)
        half = -(-len(rows) // 2)
        committed = [
            parts.commit_part(store, made.folder, table, shard, rows.slice(half * shard, half)) for shard in range(2)
        ]
        made.tables[table] = parts.table_entry(rows.schema, committed)
        return m.commit_manifest(store, made)

    def run(
        select: dict[str, Any] | None = None,
        rule: str = "all",
        queries: dict[str, list[dict[str, Any]]] | None = None,
        scores: list[dict[str, Any]] = SCORES,
        price: dict[str, float] | None = None,
        sources: str = "abababab",
    ) -> tuple[LocalStore, RunRecord]:
        store = LocalStore(tmp_path / str(len(list(tmp_path.iterdir()))))
        signals = [row | {"source": source} for row, source in zip(SIGNALS, sources, strict=True)]
        chosen = pa.Table.from_pylist(signals, schemas.SIGNAL)
        stages = [stage(store, "select", "signals", chosen, queries=2, seed=1, select=select or {})]
        for name, rows in (queries or {"annotate": QUERIES}).items():
            stages.append(stage(store, name, "queries", pa.Table.from_pylist(rows, schemas.QUERY)))
        stages.append(stage(store, "keep", "scores", pa.Table.from_pylist(scores, schemas.SCORE), keep={"rule": rule}))
        entries = [{"name": each.stage, "fingerprint": each.fingerprint, "manifest": each.path} for each in stages]
        config = {"budget": {"queries": 8, **({"price": price} if price else {})}}
        return store, RunRecord(run="r", name="r", root=store.uri, config=config, stages=entries)

    return run


def by_signal(run: tuple[LocalStore, RunRecord]) -> dict[str, dict[str, Any]]:
    return {row["signal"]: row for row in choices(*run)}


def test_signals_read_no_texts_and_count_tokens_by_source(made: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str] | None] = []
    decode = parts.decode_part

    def noting(*arguments: Any) -> pa.Table:
        asked.append(arguments[3])
        return decode(*arguments)

    monkeypatch.setattr(parts, "decode_part", noting)
    by_way = by_signal(made(price={"input": 1.0, "output": 2.0}))
    assert len(asked) == 6
    assert not any(columns is None or LARGE & set(columns) for columns in asked)
    assert by_way["unique answers"] == {
        "signal": "unique answers",
        "prompts": 2,
        "shared": 2,
        "known_wrong": 2,
        "known": 2,
        "mean_unique_answers": 7.5,
        "mean_ta_student": 0.8125,
        # One prompt of each source.
        "queries": 2,
        "teacher_tokens": 15 + 25,
        "money": pytest.approx((5 + 2 * 10 + 5 + 2 * 20) / 1000),
        "note": "",
    }
    assert by_way["TA's confidence"]["shared"] == 0


def test_queries_are_those_that_prompts_were_charged(made: Run) -> None:
    """Several answers a prompt, by two teachers, and a target beside; a prompt that was not asked says nothing."""
    first = [row | {"queries": 2 if row["prompt_id"] in ("p1", "p3") else 1} for row in QUERIES[:4]]
    unasked = {"queries": 0, "prompt_tokens": 0, "completion_tokens": 0}
    second = [row | ({} if number % 2 else unasked) for number, row in enumerate(QUERIES[:4])]
    beside = [row | ({"queries": 1} if number == 1 else unasked) for number, row in enumerate(QUERIES)]
    by_way = by_signal(made(queries={"annotate": first, "annotate-coder": second, "auxiliary": beside}))
    # a: 1 and 1; b: 2 + 1 + 1 and 2 + 1. The TA doubts p0 and p1 most.
    way = by_way["TA's confidence"]
    assert (way["prompts"], way["queries"]) == (2, round(1 + 3.5))
    assert way["teacher_tokens"] == round(15 + (3 * 25 + 2 * 25) / 2)
    assert way["money"] is None


def test_ways_keep_what_the_run_sets_beside_them(made: Run) -> None:
    own = Select(source_share=0.5, balance=0.3, consistency="entropy", consistency_weight=3, same_text=70)
    found = ways(own)
    assert found["both"] == own.model_copy(update={"rule": "signals"})
    assert {(way.source_share, way.balance, way.same_text) for way in found.values()} == {(0.5, 0.3, 70)}
    assert found["unique answers"].consistency == "unique"
    # A run with one of both signals says nothing of how it would weigh the other.
    alone = ways(Select(rule="signals", assistant_weight=0, consistency_weight=2, consistency="majority"))["both"]
    assert (alone.consistency, alone.consistency_weight, alone.assistant_weight) == ("majority", 1, 1)
    # p7 and p6 have the most answers; where each source may have one place, p0 has the other.
    free, bound = (
        by_signal(made(select=select, sources="baaaaaaa"))["unique answers"] for select in ({}, {"source_share": 0.5})
    )
    assert (free["shared"], bound["shared"]) == (2, 1)
    assert (free["mean_unique_answers"], bound["mean_unique_answers"]) == (7.5, 4.5)


def test_the_filter_behind_the_teacher_has_a_line(made: Run) -> None:
    """p1 has two answers of which one was dropped, p2 one; the student's text in place of another is no annotation."""
    low = {"reason": "below_threshold"}
    scores = [*SCORES[:2], SCORES[1] | low, SCORES[2] | low, SCORES[3] | {"reason": "empty"}]
    scores += [SCORES[4] | {"reason": "stand_in"}, SCORES[4] | {"reason": "replaced"}]
    twice = [row | {"queries": 2} if row["prompt_id"] == "p1" else row for row in QUERIES]
    queries = {"annotate": twice, "auxiliary": QUERIES}
    run = made(rule="quantile", scores=scores, queries=queries, price={"input": 1.0, "output": 2.0})
    row = by_signal(run)[AFTER]
    note = "acts after the query; its amounts are those of 2 dropped of 6 annotations (quantile)"
    known = {"signal": AFTER, "prompts": 2, "queries": 2, "teacher_tokens": round(25 / 2 + 15), "note": note}
    assert {name: value for name, value in row.items() if value is not None} == known | {
        "money": pytest.approx(((5 + 2 * 20) / 2 + 5 + 2 * 10) / 1000)
    }
    console = Console(record=True, width=200)
    console.print(choices_table(choices(*run)))
    shown = console.export_text()
    assert f"{AFTER}: {note}" in shown
    assert "every candidate was selected" not in shown


def test_without_a_threshold_nothing_is_said_of_one(made: Run) -> None:
    for rule in ("all", "weight"):
        row = by_signal(made(rule=rule))[AFTER]
        assert [row[name] for name in ("prompts", "queries", "teacher_tokens", "money")] == [None] * 4
        assert row["note"] == f"acts after the query; signals.keep.rule {rule} drops nothing by it"
    none = by_signal(made(rule="absolute"))[AFTER]
    assert (none["prompts"], none["queries"], none["teacher_tokens"]) == (0, 0, 0)


def test_costs_are_unknown_before_an_annotation_is_judged(made: Run) -> None:
    """A run of one stage that has just selected."""
    store, record = made()
    rows = choices(store, record.model_copy(update={"stages": record.stages[:1]}))
    assert AFTER not in [row["signal"] for row in rows]
    assert {(row["prompts"], row["queries"], row["teacher_tokens"], row["money"]) for row in rows} == {
        (2, None, None, None)
    }
    choices_table(rows)

"""What each signal would have chosen, read from the columns that it takes."""

from pathlib import Path

import pyarrow as pa
import pytest

from flows.compare import choices
from flows.record import RunRecord
from infra import manifest as m
from infra import parts
from infra.store import LocalStore
from tasks import schemas

LARGE = {"text", "majority_text", "prompt_token_ids", "token_logprobs"}


def test_signals_read_no_texts_and_count_tokens_by_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)

    def stage(name: str, table: str, rows: pa.Table, **settings: int) -> m.Manifest:
        base = {"module": "m", "version": 1, "fingerprint": "a" * 16, "inputs": {}}
        made = m.Manifest(stage=name, settings=settings, **base)
        committed = [
            parts.commit_part(store, made.folder, table, shard, rows.slice(4 * shard, 4)) for shard in range(2)
        ]
        made.tables[table] = parts.table_entry(rows.schema, committed)
        return m.commit_manifest(store, made)

    signals = [
        {
            "prompt_id": f"p{number}",
            "source": "ab"[number % 2],
            "unique_answers": number + 1,
            "majority_share": 0.5,
            "entropy": 0.5,
            "ta_student": number / 8,
            "correct": number < 4,
            "selected": number >= 6,
        }
        for number in range(8)
    ]
    ids = [{"prompt_id": f"p{number}", "source": "ab"[number % 2]} for number in range(8)]
    charged = [
        {"prompt_id": f"p{number}", "queries": 1, "prompt_tokens": 5, "completion_tokens": 10 + 10 * (number % 2)}
        for number in range(8)
    ]
    made = [
        stage("select", "signals", pa.Table.from_pylist(signals, schemas.SIGNAL), queries=2, seed=1),
        stage("annotate", "queries", pa.Table.from_pylist(charged, schemas.QUERY)),
        stage("keep", "scores", pa.Table.from_pylist(ids, schemas.SCORE)),
    ]
    stages = [{"name": each.stage, "fingerprint": each.fingerprint, "manifest": each.path} for each in made]
    config = {"budget": {"queries": 8, "price": {"input": 1.0, "output": 2.0}}}
    record = RunRecord(run="r", name="r", root=store.uri, config=config, stages=stages)
    asked: list[list[str] | None] = []
    decode = parts.decode_part

    def noting(*arguments: object) -> pa.Table:
        asked.append(arguments[3])
        return decode(*arguments)

    monkeypatch.setattr(parts, "decode_part", noting)
    by_way = {row["signal"]: row for row in choices(store, record)}
    assert len(asked) == 6
    assert not any(columns is None or LARGE & set(columns) for columns in asked)
    assert by_way["unique answers"] | {"signal": ""} == {
        "signal": "",
        "queries": 2,
        "shared": 2,
        "known_wrong": 2,
        "known": 2,
        "mean_unique_answers": 7.5,
        "mean_ta_student": 0.8125,
        # One prompt of each source.
        "teacher_tokens": 15 + 25,
        "money": pytest.approx((5 + 2 * 10 + 5 + 2 * 20) / 1000),
    }
    assert by_way["TA's confidence"]["shared"] == 0

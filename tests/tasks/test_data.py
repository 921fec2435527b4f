"""Training data: the very rows that a reader of whole tables finds, in its order, and none of them in memory."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from toys import commit_inputs, kept_rows, save_model, stage_of

from infra import mapped
from infra.faults import fault_of
from infra.manifest import DamagedError, Manifest, commit_manifest
from infra.store import LocalStore
from tasks.batches import Sequence, chance
from tasks.data import read_data
from tasks.loop import Loop
from tasks.schemas import CHARGED, KEPT
from tasks.stage import Stage, StageSpec
from tasks.student import World
from tasks.train import plan_of

Rows = list[dict[str, Any]]
FITS: dict[str, Any] = {"seed": 3, "validation_share": 0.3, "max_length": 18, "max_new_tokens": 12}
NAMES = ["row_id", "prompt_id", "prompt_token_ids", "token_ids", "weight", "distributions", "soft"]


def commit(store: LocalStore, name: str, parts: list[pa.Table]) -> Manifest:
    """Kept rows and their charged prompts."""
    stage: Stage[Any] = Stage(StageSpec(stage=name, module="", root=store.uri), None)  # type: ignore[arg-type]
    for shard, rows in enumerate(parts):
        stage.commit("kept", shard, rows)
        stage.commit("charged", shard, rows.select(CHARGED.names))
    stage.close_table("kept", KEPT)
    stage.close_table("charged", CHARGED)
    return commit_manifest(store, stage.manifest)


def toy_rows(name: str, count: int, prompts: int) -> pa.Table:
    """Rows of few prompts, so that ids come again."""
    random = np.random.default_rng(len(name))
    rows = kept_rows(count, seed=len(name)).to_pylist()
    for number, row in enumerate(rows):
        row |= {"row_id": f"{name}{number}", "prompt_id": f"p{random.integers(prompts)}"}
        row |= {"distributions": bytes([number % 256]), "weight": float(random.random())}
    rows[5]["token_ids"] = []
    return pa.Table.from_pylist(rows, KEPT)


def whole(inputs: Rows, auxiliary: Rows, soft: Rows | None, stored: bool) -> tuple[Rows, Rows, Rows, dict[str, int]]:
    """The twin: whole tables as lists. Rows, validation rows, prompts, and what is left out."""

    def held_out(row: dict[str, Any]) -> bool:
        return chance(FITS["seed"], "validation", row["prompt_id"]) < FITS["validation_share"]

    left_out = {"rows_too_long": 0, "rows_empty": 0}
    sides: list[tuple[Rows, Rows]] = []
    for rows in (inputs, auxiliary, soft or []):
        fitting = []
        for row in rows:
            prompt, response = len(row["prompt_token_ids"]), len(row["token_ids"])
            left_out["rows_too_long"] += prompt + response > FITS["max_length"]
            left_out["rows_empty"] += not prompt * response
            if prompt * response and prompt + response <= FITS["max_length"]:
                fitting.append(row)
        sides.append(([row for row in fitting if not held_out(row)], [row for row in fitting if held_out(row)]))
    (train, validation), (targets, unused), (taught, also_taught) = sides
    if auxiliary:
        left_out["auxiliary_of_validation"] = len(unused)
    labels = [] if soft is None else ["distributions", "soft"]
    columns = [*NAMES[:5], *(["distributions"] if stored else [])]
    own = [row | {"soft": False} | ({} if stored else {"distributions": None}) for row in train + targets]
    mentors = [row | {"soft": True} for row in taught + also_taught]
    chosen = [{name: row[name] for name in dict.fromkeys([*columns, *labels])} for row in own + mentors]
    first = list({row["prompt_id"]: row for row in reversed(inputs)}.values())
    first.sort(key=lambda row: inputs.index(row))
    room = [row for row in first if len(row["prompt_token_ids"]) <= FITS["max_length"] - FITS["max_new_tokens"]]
    left_out["prompts_too_long"] = len(first) - len(room)
    left_out["prompts_of_validation"] = sum(map(held_out, room))
    prompts = [{name: row[name] for name in ("prompt_id", "prompt_token_ids")} for row in room if not held_out(row)]
    return chosen, [{name: row[name] for name in columns} for row in validation], prompts, left_out


@pytest.mark.parametrize("batch_bytes", [1, 3000, 16 << 20])
@pytest.mark.parametrize(
    ("stored", "mentor", "auxiliary"),
    [(False, False, False), (True, False, True), (False, True, True), (True, True, False)],
)
def test_rows_and_their_order_are_those_of_whole_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_bytes: int, stored: bool, mentor: bool, auxiliary: bool
) -> None:
    monkeypatch.setattr(mapped, "BATCH_BYTES", batch_bytes)
    store = LocalStore(tmp_path)
    tables = {name: toy_rows(name, count, 90) for name, count in (("keep", 150), ("again", 90), ("more", 70))}
    tables["mentor-keep"] = toy_rows("mentor-keep", 60, 90)
    made = {
        name: commit(store, name, [rows.slice(at, 37) for at in range(0, len(rows), 37)])
        for name, rows in tables.items()
    }
    rows = {name: table.to_pylist() for name, table in tables.items()}
    data = read_data(
        store,
        [made["keep"], made["again"]],
        [made["more"]] if auxiliary else [],
        stored=stored,
        soft=[made["mentor-keep"]] if mentor else None,
        **FITS,
    )
    expected = whole(
        rows["keep"] + rows["again"], rows["more"] if auxiliary else [], rows["mentor-keep"] if mentor else None, stored
    )
    found = (data.rows.to_pylist(), data.validation.to_pylist(), data.prompts.to_pylist(), data.left_out)
    assert found == expected
    assert all(expected[:3])
    assert all(expected[3].values())


def test_a_damaged_part_is_found_while_rows_are_read(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    manifest = commit(store, "keep", [toy_rows("keep", 20, 90), toy_rows("again", 20, 90)])
    for table in ("kept", "charged"):
        path = manifest.tables[table].parts[1].path
        data = store.read(path)
        store.write(path, data[:40] + bytes([data[40] ^ 1]) + data[41:])
        with pytest.raises(DamagedError, match="other bytes") as raised:
            read_data(store, [manifest], **FITS)
        assert raised.value.path == path
        store.write(path, data)


def test_a_full_disk_is_named(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    rows = pa.table({"blob": [b"x" * (1 << 20)] * 6})
    spool = mapped.Spool(rows.schema)
    spool.write(rows)
    with pytest.raises(OSError, match="No space left") as raised:
        spool.write(rows)
    fault = fault_of(raised.value)
    assert fault
    assert fault.line.startswith(f"{small_disk}: No space left on device: free some space")
    del spool, raised, fault
    gc.collect()  # an error and its frames hold each other, and these the file: its disk could not be unmounted


def test_nothing_is_left_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rows = pa.table({"n": range(1000)})
    spool = mapped.Spool(rows.schema)
    spool.write(rows)
    table = spool.table()
    assert not list(tmp_path.iterdir())
    del spool
    assert table.equals(rows)


def test_validation_makes_its_sequences_micro_batch_by_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    inputs = commit_inputs(store, {"student": save_model(store, "student", seed=1)}, kept_rows(80))
    train = {"method": {"type": "sft"}, "validation_share": 0.5, "batch_size": 4, "micro_batch": 4}
    loop = Loop(plan_of(stage_of(store, inputs, train)), World(0, 1, torch.device("cpu")))
    alive, plain = [], loop.method.validate

    def counted(*given: Any, **named: Any) -> Any:
        alive.append(sum(type(thing) is Sequence for thing in gc.get_objects()))
        return plain(*given, **named)

    monkeypatch.setattr(loop.method, "validate", counted)
    loop.validate()
    assert len(alive) > 6
    # This micro-batch's and the one before it.
    assert max(alive) <= 8


def wide_rows(first: int, count: int) -> pa.Table:
    """Rows of 260 tokens."""
    ids = pa.array([f"{number:016x}" for number in range(first, first + count)])

    def tokens(length: int) -> pa.Array:
        ends = np.arange(0, length * count + 1, length, dtype=np.int32)
        return pa.ListArray.from_arrays(ends, (np.arange(length * count) % 200 + 3).astype(np.int32))

    texts = [ids, ids, ids, pa.repeat("toy", count), tokens(90), tokens(170)]
    return pa.table([*texts, pa.repeat(pa.scalar(1.0, pa.float32()), count), pa.nulls(count, pa.binary())], KEPT)


def test_a_workers_memory_does_not_grow_with_its_rows(tmp_path: Path) -> None:
    store, plans = LocalStore(tmp_path), []
    inputs = commit_inputs(
        store, {name: save_model(store, name, seed=1) for name in ("student", "teacher")}, wide_rows(0, 1)
    )
    method = {"type": "gkd", "max_new_tokens": 4, "on_policy_share": 0.5}
    for count in (10_000, 100_000):
        made = commit(store, f"keep-{count}", [wide_rows(at, 5000) for at in range(0, count, 5000)])
        train = {"method": method, "validation_share": 0.001, "max_length": 300}
        plan = plan_of(stage_of(store, {**inputs, "keep": made.path}, train))
        plans.append(tmp_path / f"{count}.json")
        plans[-1].write_text(plan.model_dump_json())
    script = Path(__file__).with_name("worker_memory.py")
    command, root = [sys.executable, script, *plans], script.parents[2]
    # One thread and one allocator: how many there are on a machine, and which one a block came from, is otherwise a
    # difference of tens of MiB between two equal runs.
    calm = {"OMP_NUM_THREADS": "1", "ARROW_IO_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    here = {**os.environ, **calm, "ARROW_DEFAULT_MEMORY_POOL": "system", "PYTHONPATH": str(root)}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=root, env=here)
    assert not ended.returncode, ended.stderr
    few, many = map(json.loads, ended.stdout.splitlines())
    rows = many["rows"] - few["rows"]
    assert rows > 80_000
    # Whole tables took 3,800 bytes a row at the peak. The slack is for allocators, which keep some of what they got.
    for figure in ("peak", "held"):
        assert many[figure] - few[figure] < 30 * rows + (48 << 20), (figure, few, many)

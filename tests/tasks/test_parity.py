"""Parity of engines and training models: the gap is measured, and past the tolerance training does not start."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from toys import commit_inputs, kept_rows, save_model, stage_of

from infra.manifest import commit_manifest
from infra.models import load_model, local_folder
from infra.store import LocalStore
from tasks.config.train import Parity, Tolerance
from tasks.loop import start
from tasks.parity import Gap, gap, judge
from tasks.schemas import SAMPLE
from tasks.stage import Stage, StageSpec
from tasks.student import World
from tasks.train import plan_of

torch.set_num_threads(1)


def written(model: Any, rows: pa.Table, shift: float = 0.0) -> list[dict[str, Any]]:
    """What an engine would say of these rows: the model's own log-probabilities, moved by ``shift``."""
    found = []
    for row in rows.select(["prompt_token_ids", "token_ids"]).to_pylist():
        ids, start = torch.tensor([row["prompt_token_ids"] + row["token_ids"]]), len(row["prompt_token_ids"])
        with torch.no_grad():
            logprobs_TV = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        chosen_T = logprobs_TV.gather(-1, torch.tensor(row["token_ids"])[:, None])[:, 0] + shift
        found.append(row | {"token_logprobs": chosen_T.tolist()})
    return found


def samples(store: LocalStore, role: str, rows: list[dict[str, Any]]) -> str:
    """A manifest with these samples."""
    stage: Stage[Any] = Stage(StageSpec(stage=role, module="tasks.sample", root=store.uri), None)  # type: ignore[arg-type]
    stage.write_table("samples", pa.Table.from_pylist(rows, SAMPLE))
    return str(commit_manifest(store, stage.manifest).path)


def test_the_gap_is_that_of_the_tokens(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    model = load_model(local_folder(store, save_model(store, "student", seed=1)), "float32")
    rows = written(model, kept_rows(3))
    found = gap(model, rows)
    assert found
    assert (found.sequences, found.tokens) == (3, sum(len(row["token_ids"]) for row in rows))
    assert found.largest < 1e-5
    rows[1]["token_logprobs"][0] += 0.5
    moved = gap(model, rows)
    assert moved
    assert moved.largest == pytest.approx(0.5, abs=1e-4)
    assert moved.mean == pytest.approx(0.5 / found.tokens, abs=1e-4)
    assert gap(model, []) is None


def test_tolerance_goes_by_dtype() -> None:
    settings = Parity(float32=Tolerance(mean=0.01, largest=0.1), bfloat16=Tolerance(mean=0.1, largest=1.0))
    found = Gap(sequences=1, tokens=9, mean=0.05, largest=0.2)
    judge("teacher", found, settings, "bfloat16")
    with pytest.raises(ValueError, match=r"train\.parity: the teacher.* 0\.05 nats .* 0\.2 at most"):
        judge("teacher", found, settings, "float32")
    with pytest.raises(ValueError, match="nan"):
        judge("student", Gap(sequences=1, tokens=9, mean=float("nan"), largest=0.0), settings, "bfloat16")


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_training_starts_only_where_engines_agree(tmp_path: Path, shift: float) -> None:
    store = LocalStore(tmp_path)
    models = {
        "student": save_model(store, "student", seed=1),
        "teacher": save_model(store, "teacher", seed=2, hidden=64),
    }
    inputs = commit_inputs(store, models, kept_rows(12))
    for role, ref in models.items():
        model = load_model(local_folder(store, ref), "float32")
        inputs[f"{role}-samples"] = samples(
            store, role, written(model, kept_rows(5), shift if role == "teacher" else 0)
        )
    train = {"method": {"type": "switch", "max_new_tokens": 8}, "steps": 1}
    named = {role: f"{role}-samples" for role in models}
    plan, world = plan_of(stage_of(store, inputs, train, samples=named)), World(0, 1, torch.device("cpu"))
    if shift:
        with pytest.raises(ValueError, match=r"train\.parity: the teacher"):
            start(plan, world, None)
        return
    loop = start(plan, world, None)
    assert loop
    assert set(loop.state.parity) == {"teacher", "student"}
    assert all(found["sequences"] == 4 and found["largest"] < 1e-5 for found in loop.state.parity.values())

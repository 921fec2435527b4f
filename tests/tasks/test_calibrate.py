"""Calibrated keeping: fitted on validation prompts only, and what then decides."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from infra.manifest import commit_manifest
from infra.models import ModelRef
from infra.parts import read_rows
from infra.store import LocalStore
from kernels.calibration import isotonic
from tasks import schemas
from tasks.batches import chance
from tasks.keep import CONFIDENCE, KeepSettings, run
from tasks.stage import Stage, StageSpec

SEED, SHARE, PROMPTS = 3, 0.4, 120


def held_out(number: int) -> bool:
    return chance(SEED, "validation", f"p{number}") < SHARE


def right(number: int) -> bool:
    """The TA is sure of itself, and right half as often as it says."""
    return number % 10 < number / PROMPTS * 5


def keep(root: Path, keep: dict[str, Any], wrong_elsewhere: bool = False) -> Stage[KeepSettings]:
    """The stage's result, the TA's confidence being there already."""
    store = LocalStore(root)
    prompts, samples = [], []
    for number in range(PROMPTS):
        correct = right(number) and not (wrong_elsewhere and not held_out(number))
        prompts.append({"prompt_id": f"p{number}", "source": "toy", "answer": "1", "verifier": "number"})
        sample = {"sample_id": f"s{number}", "prompt_id": f"p{number}", "text": "1" if correct else "2"}
        samples.append(sample | {"prompt_token_ids": [1], "token_ids": [2], "finish_reason": "stop"})
    inputs = {}
    model = ModelRef(name="ta", revision="1").model_dump()
    for name, table, rows, schema in (
        ("models", None, None, None),
        ("prompts", "warmup", prompts, schemas.PROMPT),
        ("samples", "samples", samples, schemas.SAMPLE),
    ):
        stage: Stage[Any] = Stage(StageSpec(stage=name, module="", root=store.uri), None)  # type: ignore[arg-type]
        stage.facts["models"] = {"assistant": model}
        if table:
            stage.write_table(table, pa.Table.from_pylist(rows, schema))
        inputs[name] = commit_manifest(store, stage.manifest).path
    values = {"table": "warmup", "shard_size": 1000, "keep": keep, "validation_share": SHARE, "seed": SEED}
    spec = StageSpec(stage="keep", module="tasks.keep", settings=values, inputs=inputs, root=store.uri)
    found = Stage(spec, KeepSettings.model_validate(values))
    confidence = pa.table(
        {"sample_id": [f"s{n}" for n in range(PROMPTS)], "confidence": [n / PROMPTS for n in range(PROMPTS)]}
    )
    found.commit("confidence", 0, confidence.cast(CONFIDENCE))
    run(found)
    return found


def test_a_threshold_is_then_a_probability_and_the_raw_confidence_stays(tmp_path: Path) -> None:
    stage = keep(tmp_path, {"rule": "absolute", "threshold": 0.4, "calibrate": {}})
    scores = read_rows(stage.store, stage.manifest, "scores").to_pydict()
    validation = [number for number in range(PROMPTS) if held_out(number)]
    fit = isotonic([np.float32(n / PROMPTS) for n in validation], [right(n) for n in validation])
    expected = fit([np.float32(n / PROMPTS) for n in range(PROMPTS)])
    assert scores["calibrated"] == pytest.approx(expected.tolist(), abs=1e-6)
    assert scores["ta_teacher"] == pytest.approx([n / PROMPTS for n in range(PROMPTS)], abs=1e-6)
    assert scores["calibrates"] == [held_out(number) for number in range(PROMPTS)]
    assert scores["kept"] == [value >= 0.4 for value in expected]
    assert stage.facts["calibration"] == {"known": len(validation), "used": True}
    # Half of what the TA promised: fewer stay than by its own word.
    assert stage.facts["kept"] < keep(tmp_path / "raw", {"rule": "absolute", "threshold": 0.4}).facts["kept"]


def test_answers_of_other_prompts_are_not_looked_at(tmp_path: Path) -> None:
    settings = {"rule": "weight", "calibrate": {"least": 5}}
    stages = [keep(tmp_path / str(flag), settings, wrong_elsewhere=flag) for flag in (False, True)]
    columns = [read_rows(stage.store, stage.manifest, "scores")["calibrated"] for stage in stages]
    assert columns[0].equals(columns[1])
    weights = read_rows(stages[0].store, stages[0].manifest, "kept")["weight"]
    assert weights.equals(columns[0])


def test_too_few_known_answers_leave_confidence_as_it_is(tmp_path: Path) -> None:
    stage = keep(tmp_path, {"rule": "absolute", "threshold": 0.4, "calibrate": {"least": 100}})
    scores = read_rows(stage.store, stage.manifest, "scores").to_pydict()
    assert set(scores["calibrated"]) == set(scores["calibrates"]) == {None}
    assert scores["kept"] == [np.float32(n / PROMPTS) >= 0.4 for n in range(PROMPTS)]
    assert not stage.facts["calibration"]["used"]

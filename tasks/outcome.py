"""What training leaves behind: the curve, counts by position, the student's folder with its card, and the facts."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.plan import Plan
from tasks.schemas import POSITION, STEP
from tasks.stage import Stage


def summary(state: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The stage's facts from its last state and its curve."""
    rolled = [row for row in steps if row["rollouts"]]
    rollouts = [row["rollouts"] for row in rolled]
    emitted, interventions, agreeing, cuts, student_forwards, _, teacher_forwards, _ = map(sum, state["positions"])
    tokens, best = sum(row["tokens"] for row in steps), state["best"] or {}
    return {
        "steps": state["step"],
        "tokens": tokens,
        "tokens_per_second": tokens / sum(row["seconds"] for row in steps),
        "rollouts": sum(rollouts),
        "pooled": sum(row["pooled"] for row in steps),
        "phi": steps[-1]["phi"],
        "online_teacher_tokens": state["teacher_tokens"],
        "budget_exhausted": state["capped"],
        "intervention_rate": interventions / emitted if emitted else None,
        "agreeing_interventions": agreeing / interventions if interventions else None,
        "cut_rate": cuts / emitted if emitted else None,
        "student_forwards_per_token": student_forwards / emitted if emitted else None,
        "teacher_forwards_per_token": teacher_forwards / emitted if emitted else None,
        "eos_rate": sum(row["eos_rate"] * n for row, n in zip(rolled, rollouts, strict=True)) / sum(rollouts)
        if rolled
        else None,
        "response_length": emitted / sum(rollouts) if rolled else None,
        # Steps whose rollouts all ran into the length limit: a long row of them is a collapse.
        "steps_without_eos": sum(row["eos_rate"] == 0 for row in rolled),
        "start_validation_loss": state["start_loss"],
        "best_validation_loss": best.get("loss"),
        "best_step": best.get("step"),
        "data": state["data"],
        "parity": state["parity"],
        "seconds": state["seconds"],
        "peak_memory_bytes": state["peak_bytes"],
    }


CARD = """---
library_name: transformers
tags: [distillation]
---
# {name}, stage {stage_name}

A student distilled with Switchyard: {parameters:,} parameters, trained from revision `{origin}`.

- Method: `{method}`
- Data: {data}
- Training: {steps} steps, {tokens:,} response tokens, seed {seed}
- Validation loss (nats per response token): {start} before, {best} best
"""


def card(plan: Plan, facts: dict[str, Any]) -> str:
    """The model card."""
    return CARD.format(
        name=plan.student.name,
        stage_name=plan.stage_name,
        parameters=plan.student.parameters,
        origin=plan.student.revision,
        method=plan.train.method.model_dump_json(),
        data=", ".join(f"{count} {name.replace('_', ' ')}" for name, count in facts["data"].items()),
        steps=facts["steps"],
        tokens=facts["tokens"],
        seed=plan.seed,
        start=facts["start_validation_loss"],
        best=facts["best_validation_loss"],
    )


def commit(stage: Stage[Any], plan: Plan, folder: Path) -> None:
    """Commit what the last checkpoint holds."""
    state, curve = json.loads((folder / "state.json").read_text()), pq.read_table(folder / "steps.parquet")
    stage.facts |= summary(state, curve.to_pylist())
    stage.write_table("steps", curve.cast(STEP))
    counts = [range(len(state["positions"][0])), *state["positions"]]
    stage.write_table("positions", pa.table([pa.array(count) for count in counts], names=POSITION.names).cast(POSITION))
    (folder / "student" / "README.md").write_text(card(plan, stage.facts))
    path = stage.add_files("student", folder / "student")
    weights = [file for file in stage.manifest.files["student"] if file.path.endswith(".safetensors")]
    revision = hashlib.sha256("".join(file.sha256 for file in weights).encode()).hexdigest()[:16]
    place = {"path": path, "id": None, "hub_revision": None, "bytes": sum(file.bytes for file in weights)}
    stage.facts["models"] = {"student": plan.student.model_copy(update={"revision": revision, **place}).model_dump()}

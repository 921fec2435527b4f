"""Auxiliary targets: how a prompt is worded, what is charged, and which targets become training rows."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from infra.engine import ANSWERS
from infra.manifest import commit_manifest
from infra.models import ModelRef
from infra.parts import read_rows
from tasks import auxiliary, schemas
from tasks.auxiliary import AuxiliarySettings
from tasks.calls import Call
from tasks.sample import worded
from tasks.stage import Runtime, Stage, StageSpec

TEMPLATE = "Facts of: {question}"
MODEL = ModelRef(name="toy", revision="1")


def test_a_template_goes_around_the_last_user_turn() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "first {question}"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "second {question}"},
        {"role": "tool", "content": "found"},
    ]
    prompt = {"prompt_id": "p", "messages": messages}
    (found,) = worded([prompt], TEMPLATE)
    texts = [turn["content"] for turn in found["messages"]]
    assert texts == ["Be brief.", "first {question}", "yes", "Facts of: second {question}", "found"]
    assert found["prompt_id"] == "p"
    assert messages[3]["content"] == "second {question}"
    assert worded([prompt], None) == [prompt]


class Pool:
    """A teacher that repeats what it is asked, as many tokens as it has letters."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def map(self, calls: Any, repeats: Any) -> Any:
        for call in calls:
            if call is not None:
                yield call[0], self.answer(call[1])

    def answer(self, call: Call) -> pa.Table:
        rows = []
        for number, conversation in enumerate(call.arguments[1]):
            text = conversation[-1]["content"]
            self.asked.append(text)
            empty, cut = "silent" in text, "long" in text
            tokens = {"prompt_token_ids": [1] * len(text), "token_ids": [2] * 3}
            ends = {"text": "" if empty else text.upper(), "finish_reason": "length" if cut else "stop"}
            rows.append({"conversation": number, "seed": 1, **tokens, **ends})
        return pa.Table.from_pylist(rows, schema=ANSWERS)


class Access:
    def __init__(self, pool: Pool) -> None:
        self.own = pool

    def __enter__(self) -> "Access":
        return self

    def __exit__(self, *error: object) -> None: ...

    def pool(self, role: str, model: ModelRef) -> Pool:
        return self.own


def run(root: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch, **caps: int) -> Stage[AuxiliarySettings]:
    """The stage over four prompts, behind a stage that was charged two queries."""
    monkeypatch.setattr("tasks.sample.engines", lambda stage: Access(pool))
    prompts = [
        {"prompt_id": name, "source": "toy", "messages": [{"role": "user", "content": name}], "verifier": "none"}
        for name in ("plain", "silent", "long", "other")
    ]
    charged = {"queries": 2, "prompt_tokens": 20, "completion_tokens": 4}
    inputs = {}
    for name, table in (("models", None), ("prompts", pa.Table.from_pylist(prompts, schemas.PROMPT)), ("before", None)):
        stage: Stage[Any] = Stage(StageSpec(stage=name, module="", root=str(root)), None)  # type: ignore[arg-type]
        stage.facts |= {"models": {"teacher": MODEL.model_dump()}, "charged_in_all": charged, "spent_in_all": charged}
        if table:
            stage.write_table("selected", table)
        inputs[name] = commit_manifest(stage.store, stage.manifest).path
    values = {"role": "auxiliary", "engine": "teacher", "table": "selected", "template": TEMPLATE, "weight": 0.25}
    values |= {"shard_size": 2, "sampling": {"max_tokens": 3}, "caps": caps, "charged_by": "before"}
    values |= {"prompt_tokens": 40}
    spec = StageSpec(
        stage="auxiliary",
        module="tasks.auxiliary",
        settings=values,
        inputs=inputs,
        root=str(root),
        runtime=Runtime(spending={"caps": caps, "factor": 1.0}),
    )
    found = Stage(spec, AuxiliarySettings.model_validate(values))
    auxiliary.run(found)
    return found


def rows(stage: Stage[AuxiliarySettings], table: str) -> list[dict[str, Any]]:
    return read_rows(stage.store, stage.manifest, table).to_pylist()


def test_whole_targets_become_rows_with_their_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool()
    stage = run(tmp_path, pool, monkeypatch, queries=6)
    assert pool.asked == [f"Facts of: {name}" for name in ("plain", "silent", "long", "other")]
    reasons = {row["prompt_id"]: row["reason"] for row in rows(stage, "targets")}
    assert reasons == {"plain": "kept", "silent": "empty", "long": "truncated", "other": "kept"}
    kept = rows(stage, "kept")
    assert [(row["prompt_id"], row["weight"], row["source"]) for row in kept] == [
        ("plain", 0.25, "toy"),
        ("other", 0.25, "toy"),
    ]
    assert kept[0]["prompt_token_ids"] == [1] * len("Facts of: plain")
    assert kept[0]["row_id"] == kept[0]["sample_id"] == rows(stage, "samples")[0]["sample_id"]
    assert stage.facts["charged_in_all"]["queries"] == 6
    assert stage.facts["kept"] == 2


def test_what_the_answers_left_is_all_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool()
    stage = run(tmp_path, pool, monkeypatch, queries=3)
    assert pool.asked == ["Facts of: plain"]
    assert stage.facts["charged_in_all"]["queries"] == 3
    reasons = [row["reason"] for row in rows(stage, "queries")]
    assert reasons == ["answered", *["budget_exhausted"] * 3]
    # Nothing at all is no mistake: the answers are there.
    stage = run(tmp_path / "none", Pool(), monkeypatch, queries=2)
    assert (rows(stage, "kept"), stage.facts["kept"]) == ([], 0)

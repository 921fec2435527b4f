"""A stage's engines that die, hang, or do not survive a prompt: processes of their own under the pool that stages use.

The engines here answer by arithmetic and die for real; everything around them is what runs.
"""

import os
import signal
import time
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from infra.engine import ANSWERS, EngineSpec
from infra.models import ModelRef
from infra.parts import read_rows
from tasks.calls import Call
from tasks.config.signals import Keep
from tasks.engines import EnginePool
from tasks.isolate import EngineLost, isolate, joined, part
from tasks.keeping import reason, threshold
from tasks.quarantine import answered, close
from tasks.stage import Stage, StageSpec

MODEL = ModelRef(name="toy", revision="1")


class ToyEngine:
    """Answers a question with itself. Some questions have it die, hang, or say nothing."""

    def __init__(self, marks: str) -> None:
        self.marks, self.life = Path(marks), f"{os.getpid()}-{time.monotonic()}"

    def ready(self) -> str:
        return self.life

    def generate(
        self, model: dict[str, Any], conversations: list[list[dict[str, str]]], seeds: list[list[int]]
    ) -> pa.Table:
        rows: list[dict[str, Any]] = []
        for number, (conversation, own_seeds) in enumerate(zip(conversations, seeds, strict=True)):
            text = conversation[0]["content"]
            if text == "deadly" or (text == "deadly once" and self.first(text)):
                os.kill(os.getpid(), signal.SIGKILL)
            if text == "hangs once" and self.first(text):
                time.sleep(600)
            if text == "mistake":
                raise ValueError("sampling.teacher: nobody can answer this")
            text = "" if text == "says nothing" else text
            rows += [
                {"conversation": number, "seed": seed, "text": text, "finish_reason": "stop", "token_ids": [1]}
                for seed in own_seeds
            ]
        (self.marks / f"asked-{time.monotonic_ns()}").write_text(" ".join(str(row["text"]) for row in rows))
        return pa.Table.from_pylist(rows, schema=ANSWERS)

    def choice(self, model: dict[str, Any], questions: list[str]) -> list[float]:
        if "deadly" in questions:
            os.kill(os.getpid(), signal.SIGKILL)
        return [len(question) / 100 for question in questions]

    def first(self, text: str) -> bool:
        """Whether this is asked for the first time, in any life."""
        mark = self.marks / text.replace(" ", "-")
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class ToyRoom:
    """Starts one engine, as the engine room does."""

    def __init__(self, marks: str) -> None:
        self.marks, self.engine = marks, None

    def acquire(self, spec: dict[str, Any]) -> list[str]:
        name = f"toy-{spec['seed']}"
        if self.engine is None:
            options = {"name": name, "max_restarts": -1, "max_task_retries": 0, "num_cpus": 0}
            self.engine = ray.remote(ToyEngine).options(**options).remote(self.marks)
        return [name]


class Access:
    """A stage's access to the toy room."""

    def __init__(self, stage: Stage[Any], marks: Path) -> None:
        self.stage = stage
        self._room = ray.remote(ToyRoom).options(num_cpus=0).remote(str(marks))

    def room(self) -> Any:
        return self._room


@pytest.fixture
def stage(tmp_path: Path) -> Stage[Any]:
    spec = StageSpec(stage="sample", module="tasks.sample", root=str(tmp_path / "store"))
    return Stage(spec, None)  # type: ignore[arg-type]


@pytest.fixture
def pool(cluster: None, stage: Stage[Any], tmp_path: Path) -> EnginePool:
    marks = tmp_path / "marks"
    marks.mkdir()
    spec = EngineSpec(model=MODEL, root=stage.spec.root, seed=time.monotonic_ns())
    return EnginePool(Access(stage, marks), spec)  # type: ignore[arg-type]


def shards(*texts: list[str]) -> list[tuple[int, Call]]:
    """Numbered calls, two seeds a question."""
    return [
        (
            number,
            Call(
                "generate",
                (MODEL.model_dump(), [[{"role": "user", "content": text}] for text in shard], [[1, 2]] * len(shard)),
                {},
            ),
        )
        for number, shard in enumerate(texts)
    ]


def asked(tmp_path: Path) -> list[str]:
    """What engines finished, in order."""
    return [path.read_text() for path in sorted((tmp_path / "marks").glob("asked-*"))]


def test_a_prompt_that_kills_its_engine_is_quarantined_and_the_rest_goes_on(
    pool: EnginePool, stage: Stage[Any], tmp_path: Path
) -> None:
    texts = [["a", "b"], ["c", "deadly", "d", "says nothing"], ["e", "f"]]
    for shard, answers in pool.map(shards(*texts)):
        assert answers["conversation"].to_pylist() == [n for n in range(len(texts[shard])) for _ in range(2)]
        kept = answered(stage, shard, answers, [f"prompt-{text}" for text in texts[shard]])
        stage.commit("samples", shard, kept.select(["text", "seed"]))
    stage.close_table("samples", pa.schema([ANSWERS.field("text"), ANSWERS.field("seed")]))
    close(stage)
    assert read_rows(stage.store, stage.manifest, "samples", ["text"])["text"].to_pylist() == [
        text for text in ["a", "b", "c", "d", "", "e", "f"] for _ in range(2)
    ]
    (row,) = read_rows(stage.store, stage.manifest, "quarantine").to_pylist()
    assert row["prompt_id"] == "prompt-deadly"
    assert row["reason"] == "engine_died"
    assert "ActorDiedError" in row["said"] or "ActorUnavailableError" in row["said"]
    assert stage.facts["quarantined"] == 1


def test_an_engine_killed_in_a_shard_costs_that_shard_at_most(pool: EnginePool, tmp_path: Path) -> None:
    results = dict(pool.map(shards(["a"], ["b"], ["deadly once"], ["c"], ["d"])))
    assert {key: answers["text"][0].as_py() for key, answers in results.items()} == dict(
        enumerate(["a", "b", "deadly once", "c", "d"])
    )
    # Nothing that was finished is asked again.
    assert sorted(text.split()[0] for text in asked(tmp_path)) == ["a", "b", "c", "d", "deadly"]


def test_an_engine_that_hangs_is_started_again_at_its_deadline(pool: EnginePool) -> None:
    # Starting counts too, and takes longer on a busy machine than this deadline.
    dict(pool.map(shards(["started"])))
    pool.spec.deadline_seconds = 10
    results = dict(pool.map(shards(["a"], ["hangs once"], ["b"])))
    assert [results[key]["text"][0].as_py() for key in range(3)] == ["a", "hangs once", "b"]


@pytest.mark.long
def test_a_question_that_kills_the_assistant_has_no_score(pool: EnginePool) -> None:
    ((_, scores),) = pool.map([(0, Call("choice", (MODEL.model_dump(), ["x", "deadly", "xyz"]), {}))])
    assert scores[0] == 0.01
    assert isnan(scores[1])
    assert scores[2] == 0.03


@pytest.mark.long
def test_an_engine_that_survives_nothing_is_an_error(pool: EnginePool) -> None:
    with pytest.raises(EngineLost):
        dict(pool.map(shards(["deadly"] * 4)))


def test_a_mistake_is_told_and_not_tried_again(pool: EnginePool) -> None:
    with pytest.raises(ValueError, match=r"^sampling.teacher: nobody can answer this"):
        dict(pool.map(shards(["a", "mistake"])))


def test_what_is_empty_or_has_no_score_is_not_trained_on() -> None:
    rule = Keep(rule="quantile", threshold=0.5, drop_truncated=True)
    scores = np.array([0.2, nan, 0.8, 0.6], np.float32)
    least = threshold(rule, lambda: [scores[:2], scores[2:]])
    assert least == pytest.approx(0.6)
    rows = [{"text": text, "finish_reason": "stop"} for text in ("a", "b", "  ", "d")]
    reasons = [reason(rule, least, row, score, other=False) for row, score in zip(rows, scores, strict=True)]
    assert reasons == ["below_threshold", "unscored", "empty", "kept"]
    assert threshold(rule, lambda: [np.array([nan, nan])]) == 0.0


def test_parts_of_a_call_join_to_its_result() -> None:
    call = Call("mean_logprob", ("model", list("abcde"), list("vwxyz")), {})
    assert part(call, 1, 3).arguments == ("model", ["b", "c"], ["w", "x"])
    assert joined([(0, ([0.5], [3])), (1, ([0.25, 0.75], [4, 5]))]) == ([0.5, 0.25, 0.75], [3, 4, 5])
    deadly, tries = {"b", "e"}, []

    def ask(start: int, end: int) -> Any:
        own = part(call, start, end)
        tries.append("".join(own.arguments[1]))
        if deadly & set(own.arguments[1]):
            raise EngineLost("dead")
        return [ord(text) for text in own.arguments[1]], [1] * len(own.arguments[1])

    (means, counts), reasons = isolate(call, ask)
    assert counts == [1, 0, 1, 1, 0]
    assert [value for value in means if not isnan(value)] == [97, 99, 100]
    assert reasons == ["dead", "dead"]
    assert tries.count("b") == tries.count("e") == 2
    assert "abcde" not in tries, "that the whole is not survived is known"

"""Asking under a budget: engines that die, processes that die, and what is charged and spent in the end."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.engine import ANSWERS
from infra.parts import read_part
from tasks import schemas
from tasks.asking import Asking, Shard, Wave
from tasks.calls import Call
from tasks.config.budget import Price
from tasks.config.signals import Sampling
from tasks.isolate import EngineLost, isolate
from tasks.ledger import Amount, Caps, SpendingExhausted
from tasks.purse import Purse, charges
from tasks.sample import SampleSettings
from tasks.stage import Runtime, Stage, StageSpec

LONGEST, MOST = 12, 20
ANSWER_COLUMNS = pa.schema(
    [ANSWERS.field(name) for name in ("conversation", "prompt_token_ids", "token_ids", "text", "finish_reason")]
)


class Died(Exception):
    """The stage's process ends here."""


def opened(root: Path, caps: Caps, factor: float, samples: int = 1) -> tuple[Stage[SampleSettings], Purse]:
    own = SampleSettings(
        role="teacher",
        engine="teacher",
        table="prompts",
        sampling=Sampling(max_tokens=MOST, samples=samples),
        caps=caps,
        prompt_tokens=LONGEST,
    )
    spec = StageSpec(
        stage="annotate",
        module="tasks.sample",
        settings=own.model_dump(mode="json"),
        root=str(root),
        runtime=Runtime(spending={"caps": caps.model_dump(mode="json"), "factor": factor}),
    )
    stage = Stage(spec, own)
    return stage, Purse(stage, caps)


class Engines:
    """Engines that answer with texts of drawn lengths, may die with what they were asked, die of ``deadly`` prompts
    always, and keep a bill."""

    def __init__(self, draw: random.Random, samples: int, dying: float, deadly: frozenset[str] = frozenset()) -> None:
        self.draw, self.samples, self.dying, self.billed = draw, samples, dying, Amount()
        self.deadly = deadly
        self.lengths: dict[str, int] = {}

    def answer(self, prompts: list[dict[str, Any]]) -> pa.Table:
        rows = [
            {
                "conversation": number,
                "prompt_token_ids": [1] * prompt["length"],
                "token_ids": [2] * self.lengths.setdefault(prompt["prompt_id"], self.draw.randint(0, MOST)),
                "text": "x",
            }
            for number, prompt in enumerate(prompts)
            for _ in range(self.samples)
        ]
        for row in rows:
            self.billed += Amount(1, len(row["prompt_token_ids"]), len(row["token_ids"]))
        return pa.Table.from_pylist(rows, schema=ANSWER_COLUMNS)

    def isolated(self, wave: Wave, call: Call, repeats: Asking) -> pa.Table:
        """As EnginePool.map where an engine does not survive a call: it is asked in parts, each covered anew."""

        def ask(start: int, end: int) -> pa.Table:
            own = repeats.again(wave, start, end)
            if own is None:
                raise Died
            answers = self.answer(own.arguments[1])
            if self.draw.random() < self.dying or self.deadly & names(own):
                repeats.lost(wave, start, end)
                raise EngineLost("died")
            return answers

        try:
            return isolate(call, ask)[0]
        except EngineLost:
            raise Died from None

    def map(self, calls: Iterator[Any], repeats: Asking) -> Iterator[tuple[Any, pa.Table]]:
        """As EnginePool.map: at most three calls under way, in any order, and lost ones once more."""
        running: list[tuple[Any, Call, int]] = []
        lost: list[tuple[Any, int]] = []
        while True:
            ended = False
            while len(running) < 3:
                if lost:
                    call = repeats.again(lost[0][0])
                    if call is None:
                        break
                    running.append((lost[0][0], call, lost.pop(0)[1] + 1))
                    continue
                following = next(calls, "end")
                ended = following == "end"
                if following is None or ended:
                    break
                running.append((*following, 1))
            if not running:
                assert ended
                return
            key, call, tries = running.pop(self.draw.randrange(len(running)))
            if self.draw.random() < self.dying / 4:
                for _, waiting, _ in [(key, call, tries), *running]:
                    self.answer(waiting.arguments[1])  # written and billed, and nobody heard
                raise Died
            answers = self.answer(call.arguments[1])
            if self.draw.random() >= self.dying and not self.deadly & names(call):
                yield key, answers
                continue
            repeats.lost(key)
            if tries < 2:
                lost.append((key, tries))
            else:
                yield key, self.isolated(key, call, repeats)


def names(call: Call) -> set[str]:
    return {prompt["prompt_id"] for prompt in call.arguments[1]}


def table(draw: random.Random, shards: int) -> list[list[dict[str, Any]]]:
    return [
        [{"prompt_id": f"{shard}-{n}", "length": draw.randint(1, LONGEST)} for n in range(draw.randint(1, 5))]
        for shard in range(shards)
    ]


def run(root: Path, caps: Caps, factor: float, engines: Engines, prompts: list[list[dict[str, Any]]]) -> Purse:
    """One life of the stage's process."""
    stage, purse = opened(root, caps, factor, engines.samples)
    done = stage.done("samples")

    def commit(shard: Shard) -> None:
        purse.charge(shard.number, [p["prompt_id"] for p in shard.prompts], shard.used, shard.reasons)
        stage.commit("samples", shard.number, schemas.SAMPLE.empty_table())

    def call(asked: list[dict[str, Any]], spare: int) -> Call:
        return Call("generate", ("model", asked, [[0] * engines.samples for _ in asked]), {})

    shards = (Shard(number, rows) for number, rows in enumerate(prompts) if number not in done)
    asking = Asking(shards, call, commit, purse)
    for wave, answers in engines.map(asking.calls(), asking):
        asking.take(wave, answers)
    return purse


def queries(root: Path, caps: Caps, samples: int = 1) -> pa.Table:
    stage, _ = opened(root, caps, 1.0, samples)
    parts = [read_part(stage.store, part) for part in stage.done("queries").values()]
    return pa.concat_tables([schemas.QUERY.empty_table(), *parts])


@given(
    seed=st.integers(0, 2**32),
    most=st.integers(3, 30),
    tokens=st.none() | st.integers(60, 500),
    factor=st.sampled_from([1.0, 1.5, 3.0]),
    samples=st.integers(1, 2),
    dying=st.sampled_from([0.0, 0.3]),
    deadly=st.sampled_from([frozenset(), frozenset({"0-0", "2-1"})]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_death_overspends(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    most: int,
    tokens: int | None,
    factor: float,
    samples: int,
    dying: float,
    deadly: frozenset[str],
) -> None:
    draw, root = random.Random(seed), tmp_path_factory.mktemp("store")
    caps = Caps(queries=most, tokens=tokens, money=0.02 if seed % 2 else None, price=Price(input=0.01, output=0.05))
    prompts, engines = table(draw, 4), Engines(draw, samples, dying, deadly)
    for _ in range(6):
        try:
            run(root, caps, factor, engines, prompts)
            break
        except Died:
            continue
        except SpendingExhausted:
            break
        finally:
            assert caps.cover(charges(queries(root, caps, samples)))
            assert caps.cover(engines.billed, factor)
            assert engines.billed.within(opened(root, caps, factor, samples)[1].ledger.spent)


def test_what_the_budget_does_not_reach_stays_with_its_reason(tmp_path: Path) -> None:
    draw = random.Random(5)
    prompts, engines = table(draw, 6), Engines(draw, 1, dying=0.0)
    caps = Caps(queries=100, tokens=200)
    purse = run(tmp_path, caps, 1.0, engines, prompts)
    rows = queries(tmp_path, caps).to_pylist()
    assert len(rows) == sum(map(len, prompts))
    reasons = [row["reason"] for row in rows]
    answered = reasons.count("answered")
    assert 0 < answered < len(rows)
    assert set(reasons) == {"answered", "budget_exhausted"}
    # No room is left for one query more at its worst.
    assert 200 - purse.charged().tokens < LONGEST + MOST
    assert all(row["queries"] == (row["reason"] == "answered") for row in rows)
    assert purse.left()["charged"]["queries"] == answered
    assert purse.left()["spent"] == purse.left()["charged"]
    assert purse.left()["left"] == f"{100 - answered} queries, {200 - purse.charged().tokens} tokens"


def test_engines_that_die_change_no_choice(tmp_path: Path) -> None:
    """The same prompts are asked, in whatever order answers come and however often they are lost."""
    chosen = []
    for name, dying in (("calm", 0.0), ("dying", 0.4)):
        draw = random.Random(11)
        prompts, engines = table(draw, 6), Engines(random.Random(3), 1, dying)
        # Lengths belong to prompts, as texts belong to seeds.
        engines.lengths = {row["prompt_id"]: draw.randint(0, MOST) for shard in prompts for row in shard}
        caps = Caps(queries=100, tokens=300)
        while True:
            try:
                run(tmp_path / name, caps, 100.0, engines, prompts)
                break
            except Died:
                continue
        found = queries(tmp_path / name, caps).to_pylist()
        chosen.append({row["prompt_id"] for row in found if row["reason"] == "answered"})
    assert chosen[0] == chosen[1]


def test_a_prompt_that_kills_its_engine_is_left_out_and_charged_once(tmp_path: Path) -> None:
    prompts = [[{"prompt_id": f"0-{number}", "length": 3} for number in range(8)]]
    engines = Engines(random.Random(2), 1, 0.0, frozenset({"0-5"}))
    purse = run(tmp_path, Caps(queries=8), 8.0, engines, prompts)
    rows = {row["prompt_id"]: row for row in queries(tmp_path, Caps(queries=8)).to_pylist()}
    assert [name for name, row in rows.items() if row["reason"] == "no_answer"] == ["0-5"]
    assert (rows["0-5"]["queries"], rows["0-5"]["completion_tokens"]) == (1, 0)
    assert purse.charged().queries == 8
    assert engines.billed.within(purse.spent())
    assert purse.spent().queries < 8 * 8

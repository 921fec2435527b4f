"""Several teachers: who is asked what, what the others' scores decide, and that the accounts add up."""

from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from infra.manifest import commit_manifest, load_manifest
from infra.models import ModelRef
from infra.parts import read_rows
from infra.store import LocalStore
from tasks import schemas
from tasks.accounts import accounts, funnel, in_order, title
from tasks.config.budget import Budget, Price
from tasks.config.peers import Peers
from tasks.config.signals import Sampling
from tasks.keep import CONFIDENCE, KeepSettings
from tasks.keep import run as run_keep
from tasks.ledger import Amount, BudgetExhausted, Caps, SpendingExhausted, caps_between, caps_of
from tasks.purse import Purse
from tasks.review import ReviewSettings, mean_scores
from tasks.review import run as run_review
from tasks.routing import Further, Route, further, routed
from tasks.sample import SampleSettings
from tasks.sample import run as run_sample
from tasks.stage import Runtime, Stage, StageSpec

TEACHERS = ["teacher", "coder", "poet"]
SOURCES = ["sums", "code", "verse"]


def prompts(count: int) -> pa.Table:
    rows = [{"prompt_id": f"p{number}", "source": SOURCES[number % 3], "verifier": "none"} for number in range(count)]
    return pa.Table.from_pylist(rows, schemas.PROMPT)


def shares(routing: dict[str, Any], count: int = 900) -> dict[str, list[str]]:
    """Prompt ids by teacher."""
    table = prompts(count)
    return {
        name: routed(Route(teacher=name, teachers=TEACHERS, routing=routing), seed=4)(table)["prompt_id"].to_pylist()
        for name in TEACHERS
    }


def test_each_prompt_goes_to_one_teacher_or_to_all() -> None:
    asked = [f"p{number}" for number in range(900)]
    assert all(ids == asked for ids in shares({"type": "everyone"}).values())
    drawn = shares({"type": "by_weight", "shares": {"teacher": 2, "poet": 0}})
    assert sorted(chain(*drawn.values())) == sorted(asked)
    assert drawn["poet"] == []
    assert len(drawn["teacher"]) == pytest.approx(600, abs=60)
    sent = shares({"type": "by_source", "specialists": {"code": "coder", "verse": "poet"}})
    assert {name: len(ids) for name, ids in sent.items()} == dict.fromkeys(TEACHERS, 300)
    assert {int(name[1:]) % 3 for name in sent["coder"]} == {1}
    # A shard is cut as the whole is.
    route = Route(teacher="coder", teachers=TEACHERS, routing={"type": "by_weight"})
    whole = routed(route, 4)(prompts(90))["prompt_id"].to_pylist()
    parts = [routed(route, 4)(prompts(90).slice(start, 30))["prompt_id"].to_pylist() for start in (0, 30, 60)]
    assert list(chain(*parts)) == whole != []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teachers": []}, "teachers"),
        ({"teachers": [{"name": "student", "model": {"type": "huggingface", "id": "x"}}]}, "taken"),
        ({"routing": {"type": "by_source", "specialists": {"code": "nobody"}}}, "no teacher is called 'nobody'"),
        ({"routing": {"type": "by_weight", "shares": {"teacher": 0, "coder": 0}}}, "all are 0"),
    ],
)
def test_names_have_to_fit(change: dict[str, Any], said: str) -> None:
    coder = {"name": "coder", "model": {"type": "huggingface", "id": "x"}}
    Peers.model_validate({"teachers": [coder]})
    with pytest.raises(ValidationError, match=said):
        Peers.model_validate({"teachers": [coder], **change})
    with pytest.raises(ValidationError, match="two are called"):
        Peers.model_validate({"teachers": [coder, coder]})


def test_caps_are_handed_on_and_end_where_one_teachers_do() -> None:
    budget = Budget(queries=100, tokens=1000, warmup_share=0.2)
    first, second = caps_between(budget, 0.0, 0.2, [0.5, 1.0])
    assert (first.queries, first.tokens, second.tokens) == (20, 100, 200)
    assert second == caps_of(budget, 0.2)
    first, second = caps_between(budget, 0.2, 1.0, [0.25, 1.0])
    assert (first.tokens, second) == (400, caps_of(budget))


class Written:
    """Answers of two teachers to six prompts in two shards, as the sampling stages leave them."""

    def __init__(self, root: Path) -> None:
        self.store = LocalStore(root)
        model = ModelRef(name="m", revision="1").model_dump()
        self.inputs = {"models": self.made("models", {}, models=dict.fromkeys(["assistant", *TEACHERS], model))}
        self.inputs["prompts"] = self.made("prompts", {"warmup": [(schemas.PROMPT, prompts(6))]})
        for teacher, name in (("teacher", "warmup-annotate"), ("coder", "warmup-annotate-coder")):
            halves = [self.samples(teacher, range(start, start + 3)) for start in (0, 3)]
            self.inputs[name] = self.made(name, {"samples": [(schemas.SAMPLE, half) for half in halves]})

    def samples(self, teacher: str, numbers: range) -> pa.Table:
        rows = [
            {
                "sample_id": f"{teacher}{number}",
                "prompt_id": f"p{number}",
                "text": "1",
                "prompt_token_ids": [1],
                "token_ids": [2],
                "finish_reason": "stop",
            }
            for number in numbers
            if number != 5 or teacher == "coder"
        ]
        return pa.Table.from_pylist(rows, schemas.SAMPLE)

    def made(self, name: str, tables: dict[str, Any], **facts: Any) -> str:
        stage: Stage[Any] = Stage(StageSpec(stage=name, module="", root=self.store.uri), None)  # type: ignore[arg-type]
        stage.facts.update(facts)
        for table, parts in tables.items():
            for shard, (_, rows) in enumerate(parts):
                stage.commit(table, shard, rows)
            stage.close_table(table, parts[0][0])
        return commit_manifest(self.store, stage.manifest).path

    def stage(self, name: str, kind: Any, values: dict[str, Any], inputs: dict[str, str]) -> Stage[Any]:
        spec = StageSpec(stage=name, module="m", settings=values, inputs=inputs, root=self.store.uri)
        return Stage(spec, kind.model_validate(values))


def test_what_the_other_teachers_doubt_is_dropped(tmp_path: Path) -> None:
    written = Written(tmp_path)
    samples = {"teacher": "warmup-annotate", "coder": "warmup-annotate-coder"}
    review = written.stage(
        "warmup-review", ReviewSettings, {"table": "warmup", "shard_size": 3, "samples": samples}, written.inputs
    )
    # What reviewers say is given here; a whole run has it from their engines.
    given = {"coder": {"teacher0": 0.9, "teacher1": 0.2, "teacher3": None, "teacher4": 0.5}, "poet": {"teacher0": 0.7}}
    for reviewer, scores in given.items():
        rows = [{"sample_id": name, "score": score, "reviewer": reviewer} for name, score in scores.items()]
        for shard in (0, 1):
            own = [row for row in rows if int(row["sample_id"][-1]) // 3 == shard]
            review.commit(f"reviews-{reviewer}", shard, pa.Table.from_pylist(own, schemas.REVIEW))
        review.close_table(f"reviews-{reviewer}", schemas.REVIEW)
    run_review(review)
    assert review.facts["answers"] == {"teacher": 5, "coder": 6}
    assert mean_scores(written.store, review.manifest, 0) == pytest.approx({"teacher0": 0.8, "teacher1": 0.2})
    inputs = {**written.inputs, "samples": commit_manifest(written.store, review.manifest).path}

    def reasons(**values: Any) -> dict[str, str]:
        settings = {"table": "warmup", "shard_size": 3, "keep": {"rule": "all"}, **values}
        keep = written.stage("warmup-keep", KeepSettings, settings, inputs)
        for shard, rows in enumerate(([f"{t}{n}" for t in samples for n in half]) for half in (range(3), range(3, 6))):
            names = [name for name in rows if name != "teacher5"]
            keep.commit(
                "confidence", shard, pa.table({"sample_id": names, "confidence": [0.6] * len(names)}, CONFIDENCE)
            )
        run_keep(keep)
        assert read_rows(keep.store, keep.manifest, "charged").num_rows == (6 if values.get("charges", True) else 0)
        found = read_rows(keep.store, keep.manifest, "scores").to_pylist()
        return {row["sample_id"]: row["reason"] for row in found}

    assert set(reasons().values()) == {"kept"}
    found = reasons(peer_review=0.5)
    assert {name for name, reason in found.items() if reason == "kept"} == {"teacher0", "teacher4"}
    assert found["teacher3"] == found["coder0"] == "peer_review"
    assert set(reasons(charges=False).values()) == {"kept"}


def test_prompts_for_a_mentor_are_those_the_teacher_was_not_asked(tmp_path: Path) -> None:
    written = Written(tmp_path)
    table = prompts(300)
    inputs = {
        "prompts": written.made("candidates", {"candidates": [(schemas.PROMPT, table)]}),
        "select": written.made("select", {"selected": [(schemas.PROMPT, table.slice(0, 100))]}),
    }
    stage = written.stage("mentor-annotate", Further, {"apart_from": "select", "count": 30}, inputs)

    def drawn(count: int, seed: int) -> list[str]:
        chosen = further(stage, Further(apart_from="select", count=count), "candidates", seed)
        return list(chain(*(chosen(table.slice(start, 60))["prompt_id"].to_pylist() for start in range(0, 300, 60))))

    assert len(drawn(30, 1)) == 30
    assert not {int(name[1:]) for name in drawn(30, 1)} & set(range(100))
    assert set(drawn(30, 1)) != set(drawn(30, 2))
    assert len(drawn(999, 1)) == 200


def test_accounts_of_several_teachers_add_up(tmp_path: Path) -> None:
    store, manifests, charged = LocalStore(tmp_path), {}, 0
    for name in ("warmup-annotate", "warmup-annotate-coder", "annotate", "annotate-coder"):
        stage: Stage[Any] = Stage(StageSpec(stage=name, module="", root=store.uri), None)  # type: ignore[arg-type]
        charged += 5
        amount = {"queries": charged, "prompt_tokens": 10 * charged, "completion_tokens": charged}
        stage.facts.update(queries=5, charged_in_all=amount, spent_in_all=amount)
        manifests[name] = stage.manifest
    account = accounts(manifests, Budget(queries=20))[0]
    assert (account.charged, account.cap) == (20, 20)
    level = next(level for level in funnel(manifests) if level.name == "Teacher queries")
    assert (level.rows, level.warmup, level.note) == (20, 10, "teacher 10, coder 10")
    assert in_order(manifests) == list(manifests)
    assert title("annotate-coder") == "Teacher annotates what was chosen (coder)"


PRICES = {"teacher": {"input": 0.1, "output": 0.3}, "coder": {"input": 2.7, "output": 0.9}}


def spend(store: LocalStore, teacher: str, money: float, factor: float, before: str | None, least: float) -> str:
    """An annotation stage that asks until its budget is spent; every third answer is lost once. Its manifest."""
    caps = Caps(queries=10_000, money=money * least, price=Price.model_validate(PRICES[teacher]))
    settings = SampleSettings(
        role=teacher,
        engine=teacher,
        table="prompts",
        sampling=Sampling(max_tokens=20),
        caps=caps,
        charged_by="before" if before else None,
        prompt_tokens=12,
    )
    spending = {"caps": {"queries": 10_000, "money": money, "price": PRICES["teacher"]}, "factor": factor}
    spec = StageSpec(
        stage=f"annotate-{teacher}",
        module="tasks.sample",
        settings=settings.model_dump(mode="json"),
        inputs={"before": before} if before else {},
        root=store.uri,
        runtime=Runtime(spending={**spending, "prices": {"coder": PRICES["coder"]}}),
    )
    stage = Stage(spec, settings)
    purse = Purse(stage, caps)
    worst, used = Amount(1, 12, 20), Amount(1, 7, 11)
    for number in range(10_000):
        try:
            reservation = purse.ledger.reserve(number, {0: worst})
            if reservation and number % 3 == 0:
                purse.ledger.lose(reservation)
                reservation = purse.ledger.reserve(number, {0: worst})
        except BudgetExhausted:
            break
        assert reservation, "nothing else is under way"
        purse.ledger.settle(reservation, {0: used})
        purse.charge(number, [f"p{number}"], {0: used}, {0: "answered"})
    assert 3 < number < 9_999
    stage.facts.update(purse.facts(), queries=purse.ledger.charged.queries)
    return commit_manifest(store, stage.manifest).path


@pytest.mark.parametrize("order", [["teacher", "coder"], ["coder", "teacher"]])
def test_teachers_with_prices_of_their_own_share_one_sum(tmp_path: Path, order: list[str]) -> None:
    store, money = LocalStore(tmp_path), 1.1
    first = spend(store, order[0], money, 9.0, None, least=0.5)
    second = spend(store, order[1], money, 9.0, first, least=1.0)
    found = {name: load_manifest(store, path).facts for name, path in zip(order, (first, second), strict=True)}
    price = {name: Price.model_validate(own) for name, own in PRICES.items()}

    def cost(name: str, key: str) -> Fraction:
        return price[name].of(*(found[name][key][part] for part in ("prompt_tokens", "completion_tokens")))

    for key in ("charged", "spent"):
        in_all = cost("teacher", key) + cost("coder", key)
        assert Fraction(found[order[1]]["paid"][key]) == in_all
        assert found[order[1]][f"{key}_in_all"]["money"] == pytest.approx(float(in_all))
    charged = cost("teacher", "charged") + cost("coder", "charged")
    # Never above, and not one query more fits.
    assert charged <= Fraction("1.1") < charged + price[order[1]].of(12, 20)
    assert cost(order[0], "charged") <= Fraction("0.55") < cost(order[0], "charged") + price[order[0]].of(12, 20)
    budget = Budget(queries=10_000, money=money, price=price["teacher"], prices={"coder": price["coder"]})
    manifests = {"annotate": load_manifest(store, [first, second][order.index("teacher")])}
    manifests["annotate-coder"] = load_manifest(store, [first, second][order.index("coder")])
    account = accounts(manifests, budget)[-1]
    assert (account.charged, account.spent) == pytest.approx(
        (float(charged), float(cost("teacher", "spent") + cost("coder", "spent")))
    )


def test_what_is_sent_again_has_its_own_cap_at_every_price(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    first = spend(store, "teacher", 1.1, 9.0, None, least=0.5)
    with pytest.raises(SpendingExhausted):
        spend(store, "coder", 1.1, 1.05, first, least=1.0)
    ledger = sorted(store.list("stages/annotate-coder"))
    assert ledger, "it had asked before"


def test_prices_of_nobody_are_refused() -> None:
    price = Price.model_validate(PRICES["teacher"])
    with pytest.raises(ValidationError, match=r"prices\.coder: it takes a price"):
        Budget(queries=4, prices={"coder": price})
    with pytest.raises(ValidationError, match="in the same currency"):
        Budget(queries=4, price=price, prices={"coder": price.model_copy(update={"currency": "EUR"})})


def test_a_teacher_without_prompts_of_its_own_starts_no_engine_and_leaves_every_shard(tmp_path: Path) -> None:
    written = Written(tmp_path)
    routing = {"type": "by_source", "specialists": {"code": "coder"}}
    values = {
        **{"role": "poet", "engine": "poet", "table": "warmup", "shard_size": 2, "sampling": {"max_tokens": 4}},
        **{"route": {"teacher": "poet", "teachers": TEACHERS, "routing": routing}, "caps": {"queries": 6}},
        "prompt_tokens": 9,
    }
    stage = written.stage("warmup-annotate-poet", SampleSettings, values, written.inputs)
    run_sample(stage)
    tables = stage.manifest.tables
    assert (
        [part.rows for part in tables["samples"].parts] == [part.rows for part in tables["queries"].parts] == [0, 0, 0]
    )
    assert stage.facts["queries"] == 0
    assert stage.facts["charged_in_all"]["queries"] == 0

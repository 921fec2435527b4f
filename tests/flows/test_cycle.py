"""What a run begins with: new files or the open cycle's, a budget that is never exceeded, the student to start from."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import tiny

from flows.cycle import NothingToDo, begin, look, next_cycle
from flows.distill import prepare
from flows.plan import Plan, plan_run
from flows.story import Pipeline
from infra.manifest import Manifest, commit_manifest, load_manifest
from infra.parts import read_rows
from infra.store import LocalStore, Store, open_store
from tasks.config import RunConfig
from tasks.cycles import Cycle, Cycles, read_cycles, update
from tasks.promoted import promote
from tasks.stage import Stage, StageSpec

NOVEMBER = datetime(2026, 11, 8, tzinfo=UTC)
Settings = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.save_model(folder / "teacher", seed=1)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "root"))


@pytest.fixture
def settings(models: Path, tmp_path: Path) -> Settings:
    (tmp_path / "inbox").mkdir()

    def make(**recurring: Any) -> RunConfig:
        return RunConfig.model_validate(tiny.recurring(models, tmp_path / "inbox", **recurring))

    return make


def put(tmp_path: Path, name: str, start: int, count: int = 30) -> None:
    rows = [{"prompt": f"{n} + 1?", "answer": str(n + 1)} for n in range(start, start + count)]
    (tmp_path / "inbox" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def finish(store: Store, cycle: Cycle, queries: int = 24) -> None:
    update(store, "tiny", cycle.number, state="done", prompts=f"p{cycle.number}", kept=["k"], queries=queries)


def test_nothing_new_is_known_without_opening_anything(settings: Settings, store: Store, tmp_path: Path) -> None:
    with pytest.raises(NothingToDo, match=r"^nothing new$"):
        begin(settings(), store)
    (tmp_path / "inbox" / "half.jsonl").write_text('{"prompt": "1 +')
    with pytest.raises(NothingToDo, match=r"^nothing new; .*half.jsonl waits: its last line is not whole$"):
        begin(settings(), store)
    assert read_cycles(store, "tiny") == (Cycles(), None)


def test_a_cycle_takes_what_is_there_and_a_later_one_what_came_since(
    settings: Settings, store: Store, tmp_path: Path
) -> None:
    put(tmp_path, "a.jsonl", 0)
    first = begin(settings(), store)
    assert [source.path for source in first.config.prompts.sources] == [str(tmp_path / "inbox" / "a.jsonl")]
    assert first.found["after"] == {"number": 1, "earlier": [], "kept": []}
    finish(store, first.cycle)
    with pytest.raises(NothingToDo):
        begin(settings(), store)
    put(tmp_path, "b.jsonl", 30)
    second = begin(settings(), store)
    assert [Path(source.path).name for source in second.config.prompts.sources] == ["b.jsonl"]
    assert second.found["after"] == {"number": 2, "earlier": ["p1"], "kept": ["k"]}
    assert second.run.endswith("-0002")


def test_a_run_that_did_not_end_is_continued_with_its_files(settings: Settings, store: Store, tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl", 0)
    first = begin(settings(), store)
    put(tmp_path, "b.jsonl", 30)
    assert begin(settings(), store) == first
    # Once its prompts are taken, their files may go.
    update(store, "tiny", 1, prompts="p1")
    (tmp_path / "inbox" / "a.jsonl").unlink()
    again = begin(settings(), store)
    assert (again.run, again.config) == (first.run, first.config)


def test_a_file_that_changed_before_it_was_taken_is_named_anew(
    settings: Settings, store: Store, tmp_path: Path
) -> None:
    put(tmp_path, "a.jsonl", 0)
    first = begin(settings(), store)
    put(tmp_path, "a.jsonl", 0, count=40)
    put(tmp_path, "b.jsonl", 40)
    again = begin(settings(), store)
    assert again.cycle.number == first.cycle.number
    assert len(again.config.prompts.sources) == 2
    assert again.found["sources"] != first.found["sources"]


def test_prompts_that_waited_are_looked_at_again(settings: Settings, store: Store, tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl", 0, count=3)
    first = begin(settings(), store)
    update(store, "tiny", 1, state="waited", queries=0, files={})
    again = begin(settings(), store)
    assert (again.run, again.config) == ("tiny-0002", first.config)
    # The prompts stage knows them already.
    assert {**again.found, "after": None} == {**first.found, "after": None}


def test_a_month_is_never_exceeded(settings: Settings, store: Store, tmp_path: Path) -> None:
    config = settings(queries_per_month=60)
    asked = []
    for week in range(3):
        put(tmp_path, f"{week}.jsonl", 30 * week)
        start = begin(config, store, NOVEMBER)
        asked.append(start.config.budget.queries)
        finish(store, start.cycle, queries=asked[-1])
    assert asked == [24, 24, 12]
    put(tmp_path, "3.jsonl", 90)
    with pytest.raises(NothingToDo, match=r"^no teacher queries left: 60 of 60 of 2026-11 are used$"):
        begin(config, store, NOVEMBER)
    assert begin(config, store, NOVEMBER.replace(month=12)).config.budget.queries == 24


def test_what_a_run_did_not_ask_is_left_to_the_month(settings: Settings) -> None:
    config = settings(queries_per_month=40)

    def cycle(queries: int, state: str, month: int = 11) -> Cycles:
        return Cycles(cycles=[Cycle(number=1, opened=NOVEMBER.replace(month=month), queries=queries, state=state)])

    put(Path(config.prompts.sources[0].path).parent, "a.jsonl", 0)
    assert next_cycle(config, cycle(20, "done"), NOVEMBER).queries == 20
    assert next_cycle(config, cycle(3, "done"), NOVEMBER).queries == 24
    assert next_cycle(config, cycle(40, "done", month=10), NOVEMBER).queries == 24
    with pytest.raises(NothingToDo, match="no teacher queries left: 39 of 40 of 2026-11"):
        next_cycle(config, cycle(39, "done"), NOVEMBER)


def promoted(store: Store, name: str) -> str:
    """A promoted student; its report's manifest."""
    facts = {"models": {"student": {"name": "s", "revision": "r", "path": "x"}}}
    report = commit_manifest(
        store,
        Manifest(stage="report", module="m", version=1, fingerprint="f" * 16, settings={}, inputs={}, facts=facts),
    )
    said = {"student": "x", "report": "r", "reason": "", "verdict": "", "metrics": {}}
    promote(store, name, None, run="before", fingerprint="f" * 16, manifest=report.path, **said)
    return report.path


def stages(plan: Plan) -> dict[str, Any]:
    assert plan.problems == []
    return {stage.name: stage for stage in plan.stages}


def test_the_plan_says_nothing_new_or_the_cycle(settings: Settings, store: Store, tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    assert plan_run(settings(), root).summary == "nothing new"
    put(tmp_path, "a.jsonl", 0)
    first = plan_run(settings(), root)
    assert first.run.endswith("-0001")
    assert "replay" not in stages(first)
    assert read_cycles(store, "tiny") == (Cycles(), None)
    finish(store, begin(settings(), store).cycle)
    put(tmp_path, "b.jsonl", 30)
    second = plan_run(settings(), root)
    assert "replay" in stages(second)
    # Models are made once; prompts, and what follows, are the cycle's own.
    assert stages(first)["models"].fingerprint == stages(second)["models"].fingerprint
    assert stages(first)["prompts"].fingerprint != stages(second)["prompts"].fingerprint
    put(tmp_path, "b.jsonl", 30, count=31)
    (tmp_path / "inbox" / "c.jsonl").write_text('{"question": "?"}\n')
    (problem,) = plan_run(settings(), root).problems
    assert "c.jsonl" in problem
    assert "'prompt' of fields.prompt" in problem


def test_training_starts_from_the_promoted_student_and_is_judged_against_it(
    settings: Settings, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import plan

    specs: dict[str, Any] = {}
    perform = plan.Planner.perform

    def noted(self: Any, spec: Any) -> str:
        specs[spec.stage] = spec
        return perform(self, spec)

    monkeypatch.setattr(plan.Planner, "perform", noted)
    put(tmp_path, "a.jsonl", 0)
    root = str(tmp_path / "root")
    finish(store, begin(settings(), store).cycle)
    put(tmp_path, "b.jsonl", 30)

    plan_run(settings(), root)
    assert specs["warmup-train"].settings["student_input"] == "models"
    assert specs["report"].settings["rival"] is None

    report = promoted(store, "tiny")
    plan_run(settings(), root)
    assert specs["warmup-train"].inputs["promoted"] == report
    assert specs["warmup-train"].settings["student_input"] == "promoted"
    assert specs["evaluate-before"].settings["entries"][1]["weights"] == "promoted"
    assert len(specs["evaluate-after"].settings["entries"]) == 2
    assert specs["report"].settings["rival"] == {"label": "base", "fingerprint": "f" * 16}

    # A run that starts from a model of its own measures the promoted student beside it.
    own = settings()
    own = own.model_copy(update={"models": own.models.model_copy(update={"student": own.models.student.first})})
    plan_run(own, root)
    assert specs["warmup-train"].settings["student_input"] == "models"
    assert specs["evaluate-after"].settings["entries"][2] == {
        **{"label": "promoted", "engine": "student", "weights": "promoted"}
    }
    assert specs["report"].settings["rival"]["label"] == "promoted"
    # Every stage takes its settings.
    for spec in specs.values():
        (stage_type,) = get_args(get_type_hints(import_module(spec.module).run)["stage"])
        stage_type.model_validate(spec.settings)


class Here(Pipeline):
    """Does each stage in this process."""

    def perform(self, spec: StageSpec) -> str:
        run = import_module(spec.module).run
        (settings_type,) = get_args(get_type_hints(run)["stage"])
        stage = Stage(spec, settings_type.model_validate(spec.settings))
        if not stage.store.exists(spec.manifest_path):
            run(stage)
            commit_manifest(stage.store, stage.manifest)
        return spec.manifest_path


def test_prompts_of_three_weeks(settings: Settings, store: Store, tmp_path: Path) -> None:
    def week(now: int, name: str, first: int, count: int) -> Manifest:
        put(tmp_path, name, first, count)
        start = begin(settings(), store, NOVEMBER)
        assert start.cycle.number == now
        _, prompts = prepare(Here(start.config, store.uri, start.run, {}), start.found)
        found = load_manifest(store, prompts)
        if "waits" in found.facts:
            update(store, "tiny", now, state="waited", queries=0, files={})
        else:
            update(store, "tiny", now, state="done", prompts=prompts)
        return found

    def ids(manifest: Manifest, table: str) -> set[str]:
        return set(read_rows(store, manifest, table)["prompt_id"].to_pylist())

    first = week(1, "a.jsonl", 0, 30)
    assert (len(ids(first, "prompts")), len(ids(first, "heldout")), len(ids(first, "warmup"))) == (24, 6, 12)
    # A repeats itself and is 10 prompts longer, of which 3 are held out: 7 to learn from are fewer than 8.
    assert week(2, "a.jsonl", 0, 40).facts["waits"] == "10 new prompts, 3 of them to hold out"
    third = week(3, "b.jsonl", 40, 10)
    assert (len(ids(third, "prompts")), len(ids(third, "heldout")), len(ids(third, "warmup"))) == (17, 6, 8)
    assert len(ids(first, "heldout") & ids(third, "heldout")) == 3
    assert not ids(first, "prompts") & (ids(third, "prompts") | ids(third, "heldout"))
    assert third.facts["counts"]["taken_before"] == 30


def test_looking_changes_nothing(settings: Settings, tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl", 0)
    store = LocalStore(tmp_path / "root")
    assert look(settings(), store).cycle.number == 1
    assert not list((tmp_path / "root").rglob("*"))

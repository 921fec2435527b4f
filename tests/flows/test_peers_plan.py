"""Several teachers, and a mentor, as the plan shows them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from pydantic import ValidationError

from flows.plan import Plan, plan_run
from flows.preflight import affordable
from flows.story import runtime
from tasks.config import RunConfig

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("teacher", "coder", "mentor"), 1):
        tiny.save_model(folder / name, seed=seed)
    return folder


def several(models: Path, *changes: Change) -> dict[str, Any]:
    data = tiny.settings(models)
    del data["sampling"]["distributions"]
    data["train"]["method"]["annotated"] = "live"
    data["peers"] = {"teachers": [{"name": "coder", "model": {"type": "huggingface", "id": str(models / "coder")}}]}
    for change in changes:
        change(data)
    return data


@pytest.fixture
def planned(models: Path, tmp_path: Path) -> Callable[..., Plan]:
    return lambda *changes: plan_run(RunConfig.model_validate(several(models, *changes)), str(tmp_path / "root"))


def review(data: dict[str, Any]) -> None:
    data["peers"]["review"] = {"threshold": 0.4}


def by_weight(data: dict[str, Any]) -> None:
    data["peers"]["routing"] = {"type": "by_weight", "shares": {"coder": 3}}


def test_a_plan_names_every_teachers_stages_and_who_trains(planned: Callable[..., Plan]) -> None:
    plan = planned(review)
    assert plan.problems == []
    names = ["warmup-annotate", "warmup-annotate-coder", "warmup-review", "warmup-keep"]
    assert plan.names[2:6] == names
    assert plan.names[9:13] == ["annotate", "annotate-coder", "review", "keep"]
    assert plan.teacher_queries == 24
    rows = {stage.name: stage.rows for stage in plan.stages}
    assert rows["warmup-annotate"] == rows["annotate-coder"] == 6
    assert rows["review"] == 12
    assert "teachers: teacher, coder; who answers: everyone, peer review from 0.4 on" in plan.summary
    assert "switch: distributions are those of models.teacher, the first teacher" in plan.summary
    free = {"coder": {"input": 0, "output": 0}}
    assert plan.teacher_money == "1.872 USD"
    assert planned(lambda data: data["budget"].update(prices=free)).teacher_money == "0.936 USD"
    rows = {stage.name: stage.rows for stage in planned(by_weight).stages}
    assert (rows["annotate"], rows["annotate-coder"]) == (3, 9)


def test_a_setting_redoes_what_it_touches(planned: Callable[..., Plan], models: Path) -> None:
    before = {stage.name: stage.fingerprint for stage in planned(review).stages}

    def changes(*change: Change) -> set[str]:
        return {stage.name for stage in planned(review, *change).stages if before[stage.name] != stage.fingerprint}

    # Scores stay where only what is made of them changes; how a teacher is served decides nothing.
    changed = changes(lambda data: data["peers"]["review"].update(threshold=0.5))
    assert "warmup-keep" in changed
    assert not {"warmup-review", "warmup-annotate-coder", "prompts", "models"} & changed
    served = {"engine": {"max_model_len": 512, "kv_cache_gib": 0.06}}
    assert changes(lambda data: data["peers"]["teachers"][0].update(served)) == set()
    assert {"warmup-annotate", "warmup-annotate-coder"} <= changes(by_weight)
    config = RunConfig.model_validate(several(models, lambda data: data["peers"]["teachers"][0].update(served)))
    assert runtime(config, "run").engines["coder"]["max_model_len"] == 512
    assert runtime(config, "run").engines["teacher"]["max_model_len"] == 256


def test_older_settings_keep_their_names(models: Path) -> None:
    plain = RunConfig.model_validate(tiny.settings(models)).model_dump(mode="json")
    assert "peers" not in plain
    assert "mentor" not in plain


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data["sampling"].update(distributions={"type": "top"}), "sampling.distributions with peers"),
        (lambda data: data["peers"]["teachers"][0].update(model=data["models"]["teacher"]), "is a teacher already"),
        (
            lambda data: data["budget"].update(prices={"poet": {"input": 1, "output": 1}}),
            "no further teacher is called",
        ),
        (
            lambda data: data["peers"]["teachers"][0].update(engine={"max_model_len": 64}),
            "peers.teachers.0.engine.max_model_len 64 is below",
        ),
        (
            lambda data: data["peers"].update(
                review={},
                teachers=[{"name": "far", "model": {"type": "openai", "model": "m", "base_url": "https://x/v1"}}],
            ),
            "endpoints review nothing",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(models: Path, change: Change, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RunConfig.model_validate(several(models, change))


def test_a_teacher_of_another_family_is_refused_unless_it_is_served(
    planned: Callable[..., Plan], models: Path, tmp_path: Path
) -> None:
    import json
    import shutil

    folder = shutil.copytree(models / "coder", tmp_path / "stranger")
    tokens = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    stranger = {"type": "huggingface", "id": str(folder)}
    (problem,) = planned(lambda data: data["peers"]["teachers"][0].update(model=stranger)).problems
    assert problem.startswith("peers.teachers.0.model: its tokens")
    assert "type openai" in problem
    missing = {"type": "huggingface", "id": "/nowhere"}
    (problem,) = planned(lambda data: data["peers"]["teachers"][0].update(model=missing)).problems
    assert problem.startswith("peers.teachers.0.model: id: no folder")


def with_mentor(models: Path, *changes: Change) -> dict[str, Any]:
    data = tiny.settings(models)
    data["mentor"] = {"model": {"type": "huggingface", "id": str(models / "mentor")}, "train": dict(data["warmup"])}
    data["mentor"] |= {"prompts": 5, "sampling": {"max_tokens": 12}}
    for change in changes:
        change(data)
    return data


@pytest.fixture
def mentored(models: Path, tmp_path: Path) -> Callable[..., Plan]:
    return lambda *changes: plan_run(RunConfig.model_validate(with_mentor(models, *changes)), str(tmp_path / "root"))


def test_a_mentor_adds_its_stages_and_asks_the_teacher_nothing(mentored: Callable[..., Plan], models: Path) -> None:
    plan = mentored()
    assert plan.problems == []
    assert plan.names[9:13] == ["mentor-train", "mentor-annotate", "mentor-keep", "train"]
    assert plan.teacher_queries == 24
    assert "mentor: annotates up to 5 further prompts" in plan.summary
    before = {stage.name: stage.fingerprint for stage in plan.stages}
    after = mentored(lambda data: data["mentor"].update(soft_share=0.1))
    changed = {stage.name for stage in after.stages if before[stage.name] != stage.fingerprint}
    assert changed == {"train", "evaluate-after", "report"}
    config = RunConfig.model_validate(with_mentor(models))
    assert runtime(config, "run").engines["mentor"]["max_logprobs"] == config.mentor.distributions.limit


def test_a_mentor_that_has_nothing_to_do_or_cannot_is_refused(mentored: Callable[..., Plan], models: Path) -> None:
    (problem,) = mentored(lambda data: data["signals"].update(candidates=12)).problems
    assert problem.startswith("mentor: the teacher is asked about all 12 candidates")
    (problem,) = mentored(lambda data: data["mentor"]["train"].update(max_length=100)).problems
    assert problem.startswith("mentor.train.max_length: 100")
    with pytest.raises(ValidationError, match="rolls out, a mentor learns from kept rows only"):
        RunConfig.model_validate(with_mentor(models, lambda data: data["mentor"].update(train=data["train"])))
    with pytest.raises(ValidationError, match=r"engines\.student\.max_model_len 256 is below"):
        RunConfig.model_validate(with_mentor(models, lambda data: data["mentor"].update(sampling={"max_tokens": 140})))


@pytest.mark.parametrize(
    ("shares", "refused"), [({"coder": 0}, []), ({"coder": 1}, ["coder"]), ({"teacher": 0}, ["coder"])]
)
def test_the_money_covers_a_prompt_of_whoever_is_given_some(
    models: Path, shares: dict[str, float], refused: list[str]
) -> None:
    def change(data: dict[str, Any]) -> None:
        data["peers"]["routing"] = {"type": "by_weight", "shares": shares}
        data["budget"] |= {"money": 1.0, "price": {"input": 0.001, "output": 0.001}}
        data["budget"]["prices"] = {"coder": {"input": 100, "output": 100}}

    found = affordable(RunConfig.model_validate(several(models, change)))
    assert [line.partition("one prompt of ")[2].partition(",")[0] for line in found] == refused

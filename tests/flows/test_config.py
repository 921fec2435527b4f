"""Settings: what is refused, in one line with field, value and fix, before anything starts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from flows.cli import UserError, read_config
from tasks.config import RunConfig
from tasks.config.methods import Divergence

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


FOLDER = {"type": "huggingface", "id": "somewhere"}


def changed(tmp_path: Path, changes: dict[str, Any]) -> Path:
    """The tiny settings, with dotted keys set."""
    data = tiny.settings(tmp_path)
    for keys, value in changes.items():
        *parents, last = keys.split(".")
        place = data
        for key in parents:
            place = place[int(key)] if isinstance(place, list) else place[key]
        place[last] = value
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_committed_config_is_valid(path: Path) -> None:
    config = read_config(path, None)
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_overrides_are_yaml_by_path(tmp_path: Path) -> None:
    path = changed(tmp_path, {})
    config = read_config(path, ["train.steps=7", "train.method={type: sft}", "prompts.sources.0.seed=9"])
    assert (config.train.steps, config.train.method.type, config.prompts.sources[0].seed) == (7, "sft", 9)


def test_a_section_in_part_keeps_the_rest_of_its_own_default(tmp_path: Path) -> None:
    data = tiny.settings(tmp_path)
    data["warmup"], data["sampling"]["student"] = {"learning_rate": 1e-4}, {"max_tokens": 12}
    data["mentor"] = {"model": FOLDER, "train": {"steps": 7}, "sampling": {"max_tokens": 12}}
    data["train"]["method"] = {"type": "gkd", "divergence": {"beta": 0.1}, "annotated": "live"}
    config = RunConfig.model_validate(data)
    assert (config.warmup.method.type, config.warmup.steps, config.warmup.learning_rate) == ("sft", 40, 1e-4)
    assert (config.sampling.student.temperature, config.sampling.student.samples) == (0.7, 5)
    assert config.mentor is not None
    assert (config.mentor.train.method.type, config.mentor.train.steps) == ("sft", 7)
    assert config.train.method.divergence == Divergence(name="jsd", beta=0.1)


@pytest.mark.parametrize(
    ("signals", "select", "keep", "candidates"),
    [
        ({}, "random", "all", 12),
        ({"candidates": 40}, "random", "all", 40),
        ({"select": {"rule": "signals"}}, "signals", "all", None),
        ({"keep": {"rule": "quantile"}}, "random", "quantile", 12),
        # Shares of sources are chosen among more than are annotated.
        ({"select": {"balance": 0.5}}, "random", "all", None),
        ({"select": {"source_share": 0.5}}, "random", "all", None),
        ({"use": "none", "select": {"rule": "signals"}, "keep": {"rule": "quantile"}}, "random", "all", 12),
    ],
)
def test_signals_count_where_they_are_asked_for(
    tmp_path: Path, signals: dict[str, Any], select: str, keep: str, candidates: int | None
) -> None:
    config = read_config(changed(tmp_path, {"signals": signals}), None)
    assert (config.signals.select.rule, config.signals.keep.rule) == (select, keep)
    # Nobody pays for samples that decide nothing.
    assert config.candidates == candidates


def test_a_mentor_finds_candidates_that_the_teacher_was_not_asked_about(tmp_path: Path) -> None:
    mentor: dict[str, Any] = {"model": {"type": "huggingface", "id": str(tmp_path / "teacher")}, "prompts": 5}
    mentor |= {"sampling": {"max_tokens": 12}}
    config = read_config(changed(tmp_path, {"signals": {}, "mentor": mentor}), None)
    assert config.candidates == config.selected_prompts + 5


@pytest.mark.parametrize(
    ("changes", "field", "fix"),
    [
        ({"train.stepz": 3}, "train.stepz", "not permitted"),
        ({"train.steps": 0}, "train.steps", "greater than or equal to 1"),
        ({"train.steps": "many"}, "train.steps", "integer"),
        ({"name": "Bad Name"}, "name", "match"),
        ({"train.method": {"type": "magic"}}, "train.method", "'sft'"),
        ({"train.micro_batch": 3}, "train", "does not divide"),
        ({"resources": {"train_workers": 2, "min_train_workers": 3}}, "resources", "above train_workers 2: lower it"),
        ({"train.method": {"type": "minillm"}, "train.rollouts_ahead": 2}, "train", "set 0"),
        ({"train.method": {"type": "minillm", "teacher_share": 1.0}}, "train.method", "less than 1"),
        ({"train.method": {"type": "distillm"}, "train.validation_share": 0}, "train", "raise it"),
        ({"train.method": {"type": "distillm"}, "train.validate_every": 3}, "train", "lower it"),
        ({"budget.queries": 2, "budget.warmup_share": 0.1}, "config", "budget.queries"),
        ({"budget.queries": 500}, "config", "signals.candidates 20"),
        ({"budget": {"queries": 24, "money": 3}}, "budget", "set price"),
        (
            {"models.teacher": {"type": "openai", "model": "m", "base_url": "http://host/v1", "key_variable": "K"}},
            "models.teacher",
            "use https",
        ),
        ({"signals.keep.calibrate": {}, "prompts.verifier": "none"}, "config", "prompts.verifier is none"),
        ({"signals.keep.calibrate": {}, "train.validation_share": 0.0}, "config", "raise train.validation_share"),
        ({"signals.keep.calibrate": {}, "warmup.validation_share": 0.0}, "config", "raise warmup.validation_share"),
        ({"signals.select": {"rule": "oracle"}, "prompts.verifier": "none"}, "config", "set signals"),
        ({"engines.assistant.max_model_len": 248}, "config", "signals.confidence, 117 at most: raise it to 249"),
        ({"signals.confidence": {"type": "verbalized", "max_tokens": 250}}, "config", "raise it to"),
        (
            {"mentor": {"model": FOLDER, "sampling": {"max_tokens": 12}}, "train.method": {"type": "skd"}},
            "config",
            "mentor: train.method skd",
        ),
        ({"signals.keep.stand_in": {}, "train.method": {"type": "opd"}}, "config", "leave signals.keep.stand_in out"),
        ({"train.method": {"type": "opd"}, "train.rollouts_ahead": 4}, "train", "set 0"),
        ({"train.method": {"type": "opd", "temperature": 0.5}}, "train.method.opd.temperature", "equal to 1"),
        (
            {"models.teacher": {"type": "openai", "model": "m", "base_url": "https://host/v1", "extra": {"n": 8}}},
            "models.teacher",
            "extra: n is set by the request itself",
        ),
        ({"signals.keep.agreement": {}, "prompts.verifier": "none"}, "config", "prompts.verifier is none"),
        ({"signals.keep.agreement": {"max_tokens": 140}}, "config", "engines.assistant.max_model_len 256"),
        ({"signals.keep.stand_in": {}}, "config", "set train.method.annotated live"),
        ({"signals.keep.stand_in": {"margin": 0}}, "signals.keep.stand_in.margin", "greater than 0"),
        ({"auxiliary": {"template": "Key facts?"}}, "auxiliary", "stands in it 0 times: give it once"),
        ({"auxiliary": {"weight": 0}}, "auxiliary.weight", "greater than 0"),
        ({"auxiliary": {"max_tokens": 132}}, "config", "engines.teacher.max_model_len 256"),
        (
            {"auxiliary": {}, "train.method": {"type": "gkd", "on_policy_share": 1}},
            "config",
            "trains on rollouts alone",
        ),
        ({"auxiliary": {}, "budget.queries": 3}, "config", "leaves a stage none"),
        ({"sampling.teacher.max_tokens": 4000}, "config", "max_model_len"),
        ({"engines.student": {"vllm": {"seed": 1}}}, "engines.student", "seed is set by the engine itself"),
        ({"prompts.sources": []}, "prompts.sources", "at least 1"),
        ({"prompts.verifier": "guess"}, "prompts", "module:function"),
        ({"models.student": {"type": "prune", "layers": [0]}}, "models.student.prune.of", "required"),
        ({"prompts.sources": [{"type": "inbox", "path": "in"}]}, "config", "section recurring"),
        ({"prompts.heldout_sources": [{"type": "inbox", "path": "in"}]}, "config", "prompts.heldout_sources: an inbox"),
        ({"models.student": {"type": "promoted", "first": FOLDER}}, "config", "section recurring"),
        ({"models.teacher": {"type": "promoted", "first": FOLDER}}, "models.teacher", "does not match"),
        ({"recurring": {"replay_share": 1}}, "recurring.replay_share", "less than 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_mistake_names_its_field(tmp_path: Path, changes: dict[str, Any], field: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        read_config(changed(tmp_path, changes), None)
    assert any(problem.startswith(field) and fix in problem for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is not YAML"),
        ("- 1", "holds list"),
        ("", "holds NoneType"),
        ("\0", "is not YAML"),
        ("name: a\nseed: 1\nname: b", "key 'name' stands twice"),
        ("a: &a [*a]", "more than 100,000 values"),
        ("a: " + "[" * 2000, "nested too deep"),
        ("seed: .inf", "leave the setting out"),
        ("seed: 0x" + "f" * 50, "too large"),
        ("1: x", "put it in quotes"),
        ('name: "\\ud800"', "half a character"),
        ("name: !!binary eA==", "in quotes"),
        ("#" * (1 << 19), "longer than"),
    ],
    ids=lambda value: value[:20],
)
def test_a_file_that_is_no_settings(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_config(path, None)
    assert said in caught.value.problems[0]
    assert "\n" not in caught.value.problems[0]


ENDPOINT = {"type": "openai", "model": "m", "base_url": "https://host/v1"}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"models.teacher": {**ENDPOINT, "key_variable": "sk-secret"}}, "models.teacher.openai.key_variable"),
        ({"models.teacher": {**ENDPOINT, "api_key": "sk-secret"}}, "models.teacher.openai.api_key"),
        (
            {"models.teacher": {**ENDPOINT, "base_url": "https://me:sk-secret@host/v1"}},
            "models.teacher.openai.base_url",
        ),
        ({"models.teacher": {**ENDPOINT, "extra": {"headers": {"Authorization": "sk-secret"}}}}, "models.teacher"),
        ({"engines.teacher": {"vllm": {"hf_token": "sk-secret"}}}, "engines.teacher"),
    ],
    ids=["name of the variable", "unknown key", "address", "request", "vllm"],
)
def test_secrets_are_refused_and_not_said_aloud(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError) as caught:
        read_config(changed(tmp_path, changes), None)
    assert any(problem.startswith(field) for problem in caught.value.problems), caught.value.problems
    assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize("override", ["train.steps", "name.x=1"])
def test_a_broken_override(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError) as caught:
        read_config(changed(tmp_path, {}), [override])
    assert caught.value.problems[0].startswith("--set")


def switchyard(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "no-such.yaml"], "error: config: no file 'no-such.yaml'"),
        (["plan", "configs/quickstart.yaml", "--set", "budget.queries=x"], "error: budget.queries"),
        (["plan"], "Missing argument"),
        (["show", "nothing", "--root", "/nonexistent-root-of-a-test"], "error: run: 'nothing'"),
        (["nonsense"], "No such command"),
    ],
)
def test_exit_2_one_line_no_traceback(arguments: list[str], said: str) -> None:
    result = switchyard(*arguments)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_programs_read_why_they_were_refused() -> None:
    refused = switchyard("plan", "configs/quickstart.yaml", "--set", "budget.queries=x", "--json")
    (problem,) = json.loads(refused.stdout)["problems"]
    assert problem.startswith("budget.queries")

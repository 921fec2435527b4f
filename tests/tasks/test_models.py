"""The models stage: every kind of source becomes a model that loads, with its chat template."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent / "flows"))
import tiny

from infra.manifest import commit_manifest
from infra.models import ModelRef, load_model, load_tokenizer, local_folder
from infra.store import open_store
from tasks.config import load_config
from tasks.config.models import Models
from tasks.models import ModelsSettings, identity, run
from tasks.stage import Stage, StageSpec

OTHER = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models") / "teacher"
    tiny.save_model(folder, seed=1, layers=3)
    return {"type": "huggingface", "id": str(folder)}


def made(
    root: Path, student: dict[str, Any], teacher: dict[str, Any], redo: int = 0, **others: Any
) -> Stage[ModelsSettings]:
    models = Models.model_validate({"teacher": teacher, "assistant": teacher, "student": student, **others})
    found = {role: identity(getattr(models, role)) for role in ("teacher", "assistant", "student")}
    settings = ModelsSettings(models=models, identities=found)
    spec = StageSpec(
        stage="models", module="tasks.models", redo=redo, root=str(root), settings=settings.model_dump(mode="json")
    )
    stage = Stage(spec, settings)
    run(stage)
    commit_manifest(stage.store, stage.manifest)
    return stage


def loaded(root: Path, stage: Stage[ModelsSettings], role: str) -> tuple[Any, Any]:
    ref = ModelRef.model_validate(stage.facts["models"][role])
    folder = local_folder(open_store(str(root)), ref)
    return load_model(folder, "float32"), load_tokenizer(folder, ref.chat_template)


def test_a_pruned_student_keeps_chosen_layers_and_the_tokenizer(tmp_path: Path, teacher: dict[str, Any]) -> None:
    stage = made(tmp_path, {"type": "prune", "of": teacher, "layers": [0, 2]}, teacher)
    whole, _ = loaded(tmp_path, stage, "teacher")
    student, tokenizer = loaded(tmp_path, stage, "student")
    ours, theirs = student.state_dict(), whole.state_dict()
    name = "model.layers.{}.mlp.up_proj.weight"
    assert student.config.num_hidden_layers == 2
    assert ours[name.format(1)].equal(theirs[name.format(2)])
    assert ours["model.embed_tokens.weight"].equal(theirs["model.embed_tokens.weight"])
    assert tokenizer.chat_template == tiny.TEMPLATE


def test_a_fresh_student_has_the_shape_asked_for(tmp_path: Path, teacher: dict[str, Any]) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 96, "layers": 1, "heads": 2}
    stage = made(tmp_path, {"type": "fresh", "tokenizer_of": teacher, **shape}, teacher)
    student, tokenizer = loaded(tmp_path, stage, "student")
    assert (student.config.hidden_size, student.config.num_hidden_layers) == (64, 1)
    assert student.config.vocab_size == len(tokenizer)
    assert stage.facts["models"]["student"]["parameters"] == student.num_parameters()
    with pytest.raises(ValueError, match="heads: 5 do not divide"):
        made(tmp_path, {"type": "fresh", "tokenizer_of": teacher, **shape, "heads": 5}, teacher)


def test_a_chat_template_of_the_settings_reaches_every_model(tmp_path: Path, teacher: dict[str, Any]) -> None:
    stage = made(tmp_path, {"type": "prune", "of": teacher, "layers": [0]}, teacher, chat_template=OTHER)
    for role in ("teacher", "assistant", "student"):
        _, tokenizer = loaded(tmp_path, stage, role)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "[hello]"


def test_a_model_is_made_once_whatever_else_changes(
    tmp_path: Path, teacher: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = {"type": "prune", "of": teacher, "layers": [0]}
    first = made(tmp_path, student, teacher)
    monkeypatch.setattr("tasks.models.build", lambda *arguments: pytest.fail("made again"))
    again = made(tmp_path, student, teacher, chat_template_args={"enable_thinking": False})
    assert again.spec.folder != first.spec.folder
    with pytest.raises(pytest.fail.Exception, match="made again"):
        made(tmp_path, student, teacher, redo=1)
    shutil.rmtree(tmp_path / first.spec.folder)
    model, _ = loaded(tmp_path, again, "student")
    assert model.config.num_hidden_layers == 1
    assert [file.sha256 for file in again.manifest.files["student"]] == [
        file.sha256 for file in first.manifest.files["student"]
    ]


def test_a_gguf_file_becomes_a_plain_folder(tmp_path: Path, teacher: dict[str, Any]) -> None:
    source = load_config(Path(__file__).parents[2] / "configs" / "quickstart.yaml").models.teacher.model_dump()
    stage = made(tmp_path, source, teacher)
    model, tokenizer = loaded(tmp_path, stage, "student")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0, -1]).strip() == "Paris"

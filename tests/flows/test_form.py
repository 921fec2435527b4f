"""The form that Prefect's UI makes of the settings: what its JSON Schema has to say, and what it refuses by itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import is_valid_schema, validate

from flows.deploy import FILE
from flows.distill import distill
from flows.evaluate import evaluate
from flows.preflight import measurable
from flows.reap import reap
from tasks.config import RunConfig
from tasks.config.evaluation import Evaluation
from tasks.config.form import TAGS, marked
from tasks.config.preset import NAMES, Preset

DEPLOYMENTS = yaml.safe_load(FILE.read_text())["deployments"]


def schema_of(flow: Flow[..., Any]) -> dict[str, Any]:
    """As the server keeps it with a deployment."""
    return parameter_schema(flow).model_dump(exclude_unset=True)


def nodes(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
    for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else []:
        yield from nodes(inner)


@pytest.mark.parametrize("flow", [distill, evaluate, reap], ids=lambda flow: flow.name)
def test_the_form_can_be_shown(flow: Flow[..., Any]) -> None:
    schema = schema_of(flow)
    is_valid_schema(schema)
    for node in nodes(schema):
        # Prefect's form renders anyOf and leaves oneOf empty; of a union within a union it shows nothing.
        assert "oneOf" not in node
        assert not any("anyOf" in kind for kind in node.get("anyOf", []))
        assert "discriminator" not in node
    models = [node for node in nodes(schema) if node.get("type") == "object" and "properties" in node]
    for model in [*schema.get("definitions", {}).values(), *models]:
        fields = model.get("properties", {})
        assert [field["position"] for field in fields.values()] == list(range(len(fields)))


def test_every_setting_has_its_text_and_range() -> None:
    definitions = schema_of(distill)["definitions"]
    for name, model in definitions.items():
        for field, schema in model["properties"].items():
            # What says the same as the section it leads to is said there.
            section = definitions.get(schema.get("$ref", "").rpartition("/")[2], {})
            told = {**section, **schema}
            assert told.get("description") or "const" in schema, f"{name}.{field} has no text"
    steps = definitions["TrainConfig"]["properties"]["steps"]
    assert steps["description"] == "Optimiser steps. (at least 1)"
    share = definitions["Budget"]["properties"]["warmup_share"]["description"]
    assert share.endswith("(at least 0, below 1)")


def test_choices_are_named_and_told_apart() -> None:
    definitions = schema_of(distill)["definitions"]
    gates = definitions["Switch"]["properties"]["gate"]["anyOf"]
    named = [definitions[gate["$ref"].rpartition("/")[2]] for gate in gates]
    assert [gate["title"] for gate in named][:2] == ["Exponential Decay", "Linear"]
    # The form takes the choice that has most of a value's fields: each has one that no other has.
    for node in nodes(schema_of(distill)):
        members = [definitions[kind["$ref"].rpartition("/")[2]] for kind in node.get("anyOf", []) if "$ref" in kind]
        if len(members) > 1 and all("patternProperties" in member for member in members):
            marks = [list(member["properties"])[-1] for member in members]
            assert len(set(marks)) == len(marks)
            assert not any(
                set(member["properties"]) & (TAGS - {mark}) for mark, member in zip(marks, members, strict=True)
            )


def test_what_the_form_gives_back_are_the_settings(tmp_path: Path) -> None:
    config = RunConfig.model_validate(tiny.settings(tmp_path))
    plain = config.model_dump(mode="json")
    given = marked(plain)
    assert given["models"]["student"]["prune"] is True
    assert problems(given) == []
    assert RunConfig.model_validate(given) == config
    del given["models"]["student"]["type"], given["models"]["student"]["of"]["type"]
    assert problems(given) == []
    assert RunConfig.model_validate(given) == config
    # A choice that the form shows wrongly at first leaves its mark, and changes nothing.
    given["prompts"]["sources"][0]["jsonl"] = True
    assert problems(given) == []
    assert RunConfig.model_validate(given) == config
    given["prompts"]["sources"][0]["tusks"] = 3
    assert problems(given)


def problems(config: dict[str, Any]) -> list[str]:
    return [error.json_path for error in validate({"config": config}, schema_of(distill))]


def test_the_schema_refuses_by_itself_what_is_out_of_range(tmp_path: Path) -> None:
    assert problems(tiny.settings(tmp_path)) == []
    assert problems({"preset": "quickstart", "changes": ["train.steps=3"]}) == []
    assert problems({"preset": "nothing"})
    assert problems({"preset": "quickstart", "changes": ["train.steps"]})
    for section, field, value in (("train", "steps", 0), ("budget", "warmup_share", 1), ("evaluate", "bootstrap", "x")):
        data = tiny.settings(tmp_path)
        data[section][field] = value
        assert problems(data), (section, field)


@pytest.mark.parametrize("name", NAMES)
def test_presets_are_the_shipped_settings(name: str) -> None:
    settings = Preset(preset=name, changes=["seed=41"]).settings()
    assert isinstance(settings, RunConfig)
    assert settings.seed == 41


@pytest.mark.parametrize("entry", DEPLOYMENTS, ids=lambda entry: entry["name"])
def test_what_a_deployment_starts_from_is_accepted(entry: dict[str, Any]) -> None:
    flow: Flow[..., Any] = load_flow_from_entrypoint(entry["entrypoint"])
    given = entry.get("parameters", {})
    # Elsewhere an evaluation has no model to start from.
    missing = ["config"] if entry["name"] in ("evaluate-docker", "evaluate-kubernetes") else []
    errors = validate(given, schema_of(flow))
    assert [error.message for error in errors] == [f"'{name}' is a required property" for name in missing]


def test_the_evaluation_one_starts_from_can_be_made(tmp_path: Path) -> None:
    (entry,) = (entry for entry in DEPLOYMENTS if entry["name"] == "evaluate")
    assert measurable(Evaluation.model_validate(entry["parameters"]["config"]), str(tmp_path)) == []


def test_an_evaluation_is_a_run_of_few_stages(tmp_path: Path) -> None:
    source = {"type": "jsonl", "path": "problems.jsonl"}
    model = {"type": "huggingface", "id": str(tmp_path)}
    chosen = Evaluation.model_validate({"name": "weekly", "model": model, "problems": [source], "count": 7})
    settings = chosen.settings()
    assert settings.prompts.heldout == 7
    assert [source.type for source in settings.prompts.heldout_sources] == ["jsonl"]
    assert settings.models.student == chosen.model
    with pytest.raises(ValueError, match=r"engine\.max_model_len 64"):
        Evaluation.model_validate({**chosen.model_dump(), "engine": {"max_model_len": 64}})
    with pytest.raises(ValueError, match="set source"):
        Evaluation.model_validate({**chosen.model_dump(), "evaluate": {"reference": "teacher"}})

"""Settings of every wrong kind are valid, or what is wrong is said in a line each. Never a trace, never a hang."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import yaml
from garbage import EXAMPLES, damaged, fuzz, lines, mutated, texts, values
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from flows.cli import UserError, read_config
from flows.plan import plan_run
from tasks.config import RunConfig
from tasks.config.prompts import ReasoningGymSource

pytestmark = pytest.mark.timeout(7200 if EXAMPLES else 600)
FILES = sorted((Path(__file__).parent.parent.parent / "configs").glob("*.yaml"))


PATHS = ["train.steps", "name", "prompts.sources.0.path", "models.teacher", "seed.x", "engines.teacher.vllm"]
# Ten times ten times ten … values, by nine names.
MANY = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in pairwise("abcdefghi")
)


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No network to wait for; the model and the prompts that the tiny settings name are there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        for name in ("HTTP_PROXY", "HTTPS_PROXY"):
            patch.setenv(name, "http://127.0.0.1:9")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.chdir(tmp_path_factory.mktemp("work"))
        folder = Path("teacher")
        folder.mkdir()
        save_file({"w": np.zeros(2, np.float32)}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
        Path("prompts.jsonl").write_text("".join(f'{{"prompt": "What is {n}?"}}\n' for n in range(200)))
        yield


def tiny_settings() -> dict[str, Any]:
    """The tiny run's, on a file of prompts."""
    data = tiny.settings(Path())
    data["prompts"]["sources"] = [{"type": "jsonl", "path": "prompts.jsonl"}]
    return data


def look(text: bytes, overrides: list[str] | None = None) -> RunConfig | None:
    """What the command line makes of a file: settings and a plan, or lines."""
    path = Path("config.yaml")
    path.write_bytes(text)
    try:
        config = read_config(path, overrides)
    except UserError as error:
        lines(error.problems)
        return None
    # What is taken can be written down and read again.
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    # Making problems takes a process of its own, reading a GGUF file seconds; both have tests of their own.
    made = any(isinstance(source, ReasoningGymSource) for source in config.prompts.sources)
    if not made and "gguf" not in config.models.model_dump_json():
        plan = plan_run(config, "root")
        lines(plan.problems)
        json.dumps(plan.facts())
    return config


def written(document: Any) -> bytes:
    return yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "surrogatepass")


def documents() -> list[Any]:
    return [*(yaml.safe_load(path.read_text()) for path in FILES), *[tiny_settings()] * 4]


@pytest.mark.parametrize("original", documents()[: len(FILES) + 1], ids=[*(path.stem for path in FILES), "tiny"])
def test_what_is_mutated_was_valid(original: Any) -> None:
    assert look(written(original))


@fuzz()
@given(mutated(documents()))
def test_settings_with_wrong_values(document: Any) -> None:
    look(written(document))


@fuzz()
@given(damaged([path.read_bytes() for path in FILES] + [written(tiny_settings())]))
@example(b"a: [")
@example(b"")
@example(b"\0\xff\xfe")
@example(b"- 1")
@example(b"a: &a [*a]")
@example(MANY.encode())
@example(b"models: " + MANY.replace("\n", "\n  ").encode())
@example(b"[" * 5000)
@example(b"a: " + b"- " * 3000)
@example(b"name: one\nname: two")
@example(b"seed: .inf")
@example(b"seed: " + b"9" * 5000)
@example(b"seed: 0x" + b"f" * 500)
@example(b"seed: !!int ''")
@example(b"seed: !!timestamp x")
@example(b"seed: !!bool x")
@example(b"seed: !!binary eA==")
@example(b"seed: !!set {x}")
@example(b"seed: !!python/object/apply:os.system [touch x]")
@example(b'name: "\\ud800"')
@example(b"1: x")
@example(b"on: x")
@example("name: ü".encode("latin-1"))
@example("name: x".encode("utf-16"))
def test_files_that_were_damaged(data: bytes) -> None:
    look(data)


@fuzz(0.3)
@given(st.lists(texts | st.builds("{}={}".format, st.sampled_from(PATHS) | texts, texts), min_size=1, max_size=3))
@example(["train.steps=["])
@example(["seed=.nan"])
@example(["seed=" + "[" * 5000])
@example(["prompts.sources.0.fields.answer_pattern=(a{9999999999})", "prompts.sources.0.fields.answer=x"])
@example(["prompts.sources.99999999999999999999.path=x"])
def test_overrides_of_every_kind(overrides: list[str]) -> None:
    look(written(tiny_settings()), overrides)


@pytest.mark.parametrize("url", ["http://[", "http://a:99999999", "http://x..y/", "https://\x1b[31m/v1", "http://%zz"])
def test_addresses_of_no_server(url: str) -> None:
    teacher = {"type": "openai", "model": "m", "base_url": url}
    changes = {"models": {**tiny_settings()["models"], "teacher": teacher}, "name": "endpoint"}
    look(written({**tiny_settings(), **changes}))


def of_schema(schema: dict[str, Any], definitions: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a JSON schema allows, as far as pydantic writes schemas for settings."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return st.deferred(lambda: of_schema(definitions[name], definitions))
    if "anyOf" in schema:
        return st.one_of(*(of_schema(kind, definitions) for kind in schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    low, high = (
        schema.get("minimum", schema.get("exclusiveMinimum")),
        schema.get("maximum", schema.get("exclusiveMaximum")),
    )
    match schema.get("type"):
        case "integer":
            return st.integers(low, 10**6 if high is None else high)
        case "number":
            return st.floats(low, high, allow_nan=False, allow_infinity=False)
        case "string":
            return st.from_regex(schema["pattern"]) if "pattern" in schema else texts
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case "array":
            least = schema.get("minItems", 0)
            return st.lists(of_schema(schema.get("items", {}), definitions), min_size=least, max_size=least + 2)
        case "object":
            fields = {name: of_schema(inner, definitions) for name, inner in schema.get("properties", {}).items()}
            needed = {name: fields.pop(name) for name in schema.get("required", ()) if name in fields}
            return st.fixed_dictionaries(needed, optional=fields)
    return values


SCHEMA = RunConfig.model_json_schema()


@fuzz(0.5)
@given(of_schema(SCHEMA, SCHEMA["$defs"]))
def test_settings_of_the_schema(document: Any) -> None:
    """The form in Prefect's UI holds values to this schema, and gives marks in place of tags."""
    look(written(document))

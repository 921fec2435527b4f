"""What all settings share: unknown keys are refused, the text under a field is its description everywhere, and their
JSON Schema is one that Prefect's form shows."""

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

BOUNDS = (("minimum", "at least"), ("exclusiveMinimum", "above"), ("maximum", "at most"), ("exclusiveMaximum", "below"))


def spaced(model: type[Any]) -> str:
    """``HuggingFaceModel`` as a person reads it: Hugging Face Model."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", model.__name__)


class Config(BaseModel):
    """Immutable settings. Import-light: no torch, ray or vllm below ``tasks/config``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, model_title_generator=spaced)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core)
        own = handler.resolve_ref_schema(schema)
        for position, (name, field) in enumerate(own.get("properties", {}).items()):
            choices(field)
            # The tag of a choice has a default, yet a choice without it is not told from another.
            if "const" in field and name not in own.setdefault("required", []):
                own["required"].append(name)
            # The form sorts by this, and shows ranges nowhere else before something is out of one.
            field["position"] = position
            told = ranges(field)
            if told:
                field["description"] = " ".join([field.get("description", ""), f"({told})"]).strip()
        return schema


def choices(field: Any) -> None:
    """Unions by tag as ``anyOf``: Prefect's form shows no ``oneOf``. Equal here, since tags exclude each other."""
    if isinstance(field, dict):
        field.pop("discriminator", None)
        if "oneOf" in field:
            field["anyOf"] = field.pop("oneOf")
        for inner in field.values():
            choices(inner)
    elif isinstance(field, list):
        for inner in field:
            choices(inner)


def ranges(field: JsonSchemaValue) -> str:
    """The bounds of a number, or of one that may be absent, in words."""
    bounded = [field, *field.get("anyOf", [])]
    return ", ".join(f"{word} {kind[bound]:g}" for kind in bounded for bound, word in BOUNDS if bound in kind)


class Choice:
    """Mark of a union that stands outside of all settings, as a flow's parameter: it is shown like theirs."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core)
        choices(schema)
        return schema

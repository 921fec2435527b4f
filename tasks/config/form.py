"""Settings as a form: their JSON Schema as Prefect's UI can show it, and what that form gives back.

- Unions are ``anyOf``: the form leaves ``oneOf`` empty. Equal here, since tags exclude each other.
- Fields have a ``position``, which the form sorts by, and their ranges in words.
- The form tells which choice of a union a value is by the names of its fields alone, and jumps to another choice where
  these do not decide. So a choice with the tag ``type: prune`` also has a mark of its own, ``prune: true``. The form
  shows marks instead of tags, and what it gives back is read as if the tag stood there.
"""

import re
from typing import Any

from pydantic import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

BOUNDS = (("minimum", "at least"), ("exclusiveMinimum", "above"), ("maximum", "at most"), ("exclusiveMaximum", "below"))
# Tags of all choices; no field may have such a name.
TAGS: set[str] = set()


def spaced(model: type[Any]) -> str:
    """``HuggingFaceModel`` as a person reads it: Hugging Face Model."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", model.__name__)


def read(value: Any) -> Any:
    """A value, or a list of them, with marks replaced by the tag. A tag that is there already stands."""
    if isinstance(value, list):
        return [read(item) for item in value]
    if not isinstance(value, dict):
        return value
    marks = [name for name, mark in value.items() if mark is True and name in TAGS]
    if not marks:
        return value
    return {"type": marks[0]} | {name: inner for name, inner in value.items() if name not in marks}


def marked(value: Any) -> Any:
    """Settings as values that the form starts from: marks beside all tags."""
    if isinstance(value, list):
        return [marked(item) for item in value]
    if not isinstance(value, dict):
        return value
    mark = {value["type"]: True} if value.get("type") in TAGS else {}
    return mark | {name: marked(inner) for name, inner in value.items()}


def shape(schema: JsonSchemaValue) -> None:
    """Make one model's schema, without those it refers to, one for the form."""
    fields = schema.get("properties", {})
    tag = fields.pop("type", None) if "const" in fields.get("type", {}) else None
    if tag:
        # A tag is checked where it is given; marks of other choices are not held against a value.
        schema["patternProperties"] = {"^type$": tag}
        schema["additionalProperties"] = {"const": True}
        mark = {"const": True, "default": True, "type": "boolean", "title": schema["title"]}
        fields = schema["properties"] = {**fields, tag["const"]: mark}
    for position, field in enumerate(fields.values()):
        choices(field)
        field["position"] = position
        if isinstance(field.get("default"), dict):
            field["default"] = marked(field["default"])
        if told := ranges(field):
            field["description"] = " ".join([field.get("description", ""), f"({told})"]).strip()


def choices(field: Any) -> None:
    """Unions by tag as ``anyOf``, one that may be absent included: the form shows no union within a union."""
    if isinstance(field, dict):
        for inner in field.values():
            choices(inner)
        field.pop("discriminator", None)
        if "oneOf" in field:
            field["anyOf"] = field.pop("oneOf")
        if "anyOf" in field:
            field["anyOf"] = [one for kind in field["anyOf"] for one in kind.get("anyOf", [kind])]
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

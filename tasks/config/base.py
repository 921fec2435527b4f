"""What all settings share: unknown keys are refused, and the text under a field is its description everywhere."""

from typing import Any

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from tasks.config import form


def absent(value: Any) -> bool:
    """For settings that came later: where they are not set they are left out of what is hashed, so that older runs and
    results keep their names."""
    return value is None


def completed(field: FieldInfo | None, value: Any) -> Any:
    """A section that is given in part keeps the rest of its place's own default, which may be other than the section's
    elsewhere: a warm-up's steps, say, and its method."""
    default = field.default if field else None
    if not isinstance(value, dict) or not isinstance(default, Config):
        return value
    return {name: getattr(default, name) for name in default.model_fields_set} | value


class Config(BaseModel):
    """Immutable settings. Import-light: no torch, ray or vllm below ``tasks/config``."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        model_title_generator=form.spaced,
        allow_inf_nan=False,
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if "type" in cls.model_fields:
            form.TAGS.add(cls.model_fields["type"].default)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: completed(cls.model_fields.get(name), form.read(value)) for name, value in data.items()}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core)
        form.shape(handler.resolve_ref_schema(schema))
        return schema

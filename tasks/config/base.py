"""What all settings share: unknown keys are refused, and the text under a field is its description everywhere."""

from typing import Any

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from tasks.config import form


def absent(value: Any) -> bool:
    """For settings that came later: where they are not set they are left out of what is hashed, so that older runs and
    results keep their names."""
    return value is None


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
    def _from_form(cls, data: Any) -> Any:
        return {name: form.read(value) for name, value in data.items()} if isinstance(data, dict) else data

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core)
        form.shape(handler.resolve_ref_schema(schema))
        return schema

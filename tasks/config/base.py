"""What all settings share: unknown keys are refused, and the text under a field is its description everywhere."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Immutable settings. Import-light: no torch, ray or vllm below ``tasks/config``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

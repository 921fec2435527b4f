"""Evaluation on held-out problems, report and promotion."""

from typing import Literal

from pydantic import Field

from tasks.config.base import Config


class EvaluateConfig(Config):
    """How the four models are measured."""

    seeds: list[int] = Field(default_factory=lambda: [1, 2, 3, 4, 5], min_length=1)
    """One sampled response per held-out prompt and seed."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """Sampling temperature (DistiLLM and SWITCH evaluate at 1)."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest response."""
    reference: Literal["teacher", "source"] = "source"
    """What response loss and ROUGE-L compare with: the source's reference responses, or the teacher's greedy ones
    (these cost one teacher query per held-out prompt, outside the budget, and are reported)."""
    bootstrap: int = Field(default=2000, ge=100)
    """Resamples of the intervals."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Mass of the intervals."""


class PromoteConfig(Config):
    """When the new student replaces the promoted one."""

    enabled: bool = True
    """Write ``promoted.json``."""
    metric: Literal["loss", "rouge_l", "accuracy"] = "loss"
    """Where the final student must beat the base student, by the whole paired interval."""

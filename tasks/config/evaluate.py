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
    """When the new student replaces the promoted one; the limits apply where there is one."""

    enabled: bool = True
    """Promote at all."""
    metric: Literal["loss", "rouge_l", "accuracy"] = "loss"
    """Where the final student must beat the promoted one, by the whole paired interval; the base student where none is
    promoted yet."""
    min_length: float = Field(default=0.5, ge=0, le=1)
    """Responses must be at least so long, as a multiple of the promoted student's mean tokens."""
    max_length: float = Field(default=1.5, ge=1)
    """Responses may be so long at most, as a multiple of the promoted student's mean tokens."""
    max_eos_loss: float = Field(default=0.02, ge=0, le=1)
    """By how much the share of responses that end by themselves may fall."""
    max_worse_tasks: int = Field(default=0, ge=0)
    """Tasks that may get worse by their whole paired interval. Of many tasks without any change one in forty does."""
    task_problems: int = Field(default=10, ge=2)
    """A task with fewer held-out problems is not judged by itself."""

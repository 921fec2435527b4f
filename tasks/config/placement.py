"""Where the models of training lie."""

from typing import Literal

from pydantic import Field

from tasks.config.base import Config


class Placement(Config):
    """Where training's models lie. It decides memory and speed, no result."""

    teacher: Literal["auto", "whole", "sharded", "served"] = "auto"
    """``whole``: on every worker. ``sharded``: its layers spread over all workers, gathered for each forward.
    ``served``: by vLLM engines beside the workers, with the settings of ``engines.teacher``; workers hold its
    projection. ``auto``: the first of these that memory allows."""
    model_share: float = Field(default=0.6, gt=0, le=1)
    """Share of a worker's memory that models may take, gradients and optimiser states with them; the rest is for
    activations and rollouts. Within it the student is a replica on every worker; above it GPUs hold shards of it."""
    worker_memory_gib: float | None = Field(default=None, gt=0)
    """Memory of a worker's GPU, or a worker's part of its machine's. Absent: workers look at their own, and the plan of
    work that is done elsewhere, or on GPUs, assumes 80."""

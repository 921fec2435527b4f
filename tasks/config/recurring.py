"""Distillation on a schedule: what a run takes over from the runs before it, and what it may spend."""

from pydantic import Field

from tasks.config.base import Config


class Recurring(Config):
    """Runs of one name under one root follow each other: see docs/recurring.md."""

    min_prompts: int = Field(default=20, ge=2)
    """New prompts to learn from, beside those held out, that make a run worth it; fewer wait for the next one."""
    heldout_renewal: float = Field(default=0.2, ge=0, le=1)
    """Share of the held-out prompts that each run replaces by new ones, so that no series of students is fitted to
    them."""
    replay_share: float = Field(default=0.3, ge=0, lt=1)
    """Share of stage 2's rows that earlier runs kept."""
    queries_per_month: int | None = Field(default=None, ge=2)
    """Annotation queries of all runs of one calendar month (UTC, by the time a run began); no limit where absent."""

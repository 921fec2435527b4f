"""Training: what is minimised, and how."""

from typing import Literal

from pydantic import Field, model_validator

from tasks.config.base import Config
from tasks.config.methods import Method, Switch


class Lora(Config):
    """Train low-rank adapters; they are merged into the finished student."""

    rank: int = Field(default=16, ge=1)
    """Rank."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale numerator."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' input."""
    targets: list[str] = Field(default_factory=lambda: ["q_proj", "v_proj"], min_length=1)
    """Names of the adapted linear layers."""


class Tolerance(Config):
    """What two computations of one log-probability may differ by, nats."""

    mean: float = Field(gt=0)
    """On average over tokens."""
    largest: float = Field(gt=0)
    """At any token."""


class Parity(Config):
    """A check before stage 2: engines and training models give the same log-probabilities."""

    sequences: int = Field(default=4, ge=0)
    """Sequences compared for teacher and student each; 0: no check."""
    float32: Tolerance = Tolerance(mean=0.005, largest=0.1)
    """Allowed in float32."""
    bfloat16: Tolerance = Tolerance(mean=0.1, largest=2.0)
    """Allowed in bfloat16."""


class TrainConfig(Config):
    """One training stage."""

    method: Method = Switch()
    """What is minimised, on which sequences."""
    steps: int = Field(default=100, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(default=8, ge=1)
    """Sequences of one optimiser step, over all workers."""
    micro_batch: int = Field(default=8, ge=1)
    """Sequences a worker holds at once; results do not depend on it."""
    learning_rate: float = Field(default=5e-4, gt=0)
    """Peak of AdamW's learning rate."""
    final_learning_rate_share: float = Field(default=0.1, ge=0, le=1)
    """Where the cosine ends, as a share of the peak."""
    warmup_steps: int = Field(default=5, ge=0)
    """Steps of linear rise."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Gradient norm above which gradients are scaled down."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of forward and backward; ``auto``: bfloat16 on GPUs, float32 on CPU. Optimiser states stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations: less memory, about a third more time."""
    lora: Lora | None = None
    """Train adapters only."""
    max_length: int = Field(default=512, ge=16)
    """Longest prompt and response together; longer rows are left out, counted."""
    validation_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the kept rows set aside to choose the best checkpoint."""
    validate_every: int = Field(default=20, ge=1)
    """Steps between validations."""
    checkpoint_every: int = Field(default=20, ge=1)
    """Steps between resumable checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many resumable checkpoints stay."""
    keep: Literal["best", "last"] = "best"
    """Which weights become the student: the best validation loss's, or the last's."""

    rollouts_ahead: int = Field(default=0, ge=0, le=64)
    """Optimiser steps that rollouts may be older than the student: so many steps more are rolled out at once, in larger
    batches. 0: strictly on-policy."""
    parity: Parity = Parity()
    """Compare engines and training models first, where the method compares distributions."""

    @model_validator(mode="after")
    def _batches_fit(self) -> "TrainConfig":
        if self.batch_size % min(self.micro_batch, self.batch_size):
            raise ValueError(f"micro_batch {self.micro_batch} does not divide batch_size {self.batch_size}")
        name = self.method.type
        if self.rollouts_ahead and self.method.keeps_rollouts:
            raise ValueError(f"rollouts_ahead {self.rollouts_ahead}: {name} trains on rollouts again anyway, set 0")
        if self.rollouts_ahead and name == "opd":
            raise ValueError(f"rollouts_ahead {self.rollouts_ahead}: opd takes the student's own draws, set 0")
        if name == "distillm" and not self.validation_share:
            raise ValueError("validation_share 0: distillm rolls out once the validation loss has risen, raise it")
        if name == "distillm" and self.validate_every >= self.steps:
            raise ValueError(
                f"validate_every {self.validate_every} of {self.steps} steps: distillm rolls out once the validation "
                "loss has risen, lower it"
            )
        return self

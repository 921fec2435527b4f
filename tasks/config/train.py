"""Training: what is minimised, on which sequences, and how."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tasks.config.base import Config


class ExponentialDecay(Config):
    """τ_t = max(floor, initial · e^(−rate·t)): the paper's choice."""

    type: Literal["exponential_decay"] = "exponential_decay"
    initial: float = Field(default=1.0, gt=0)
    """τ_0."""
    rate: float = Field(default=0.1, gt=0)
    """λ, per token."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """τ_min (ours): keeps long tails from becoming pure teacher text."""


class Linear(Config):
    """τ_t falls from 1 to 0 over the longest response."""

    type: Literal["linear"] = "linear"
    floor: float = Field(default=0.0, ge=0, le=1)
    """τ_min (ours)."""


class ExponentialGrowth(Config):
    """τ_t = 1 − e^(−rate·t)."""

    type: Literal["exponential_growth"] = "exponential_growth"
    rate: float = Field(default=0.1, gt=0)
    """λ, per token."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """τ_min (ours)."""


class Constant(Config):
    """τ_t = value."""

    type: Literal["constant"] = "constant"
    value: float = Field(default=0.2, ge=0, le=1)
    """τ."""


class MixIn(Config):
    """The token comes from the teacher with probability alpha (MiniLLM)."""

    type: Literal["mix_in"] = "mix_in"
    alpha: float = Field(default=0.2, ge=0, le=1)
    """Probability of the teacher."""


class RandomTeacher(Config):
    """The teacher writes at random."""

    type: Literal["random_teacher"] = "random_teacher"
    probability: float = Field(default=0.5, ge=0, le=1)
    """Probability of the teacher."""


class Adaptive(Config):
    """The teacher writes the rest once KL(p‖q) exceeds a multiple of its running mean (after AdaSwitch)."""

    type: Literal["adaptive"] = "adaptive"
    factor: float = Field(default=3.0, gt=1)
    """K."""
    window: int = Field(default=8, ge=1)
    """Positions of the running mean."""


Gate = Annotated[
    ExponentialDecay | Linear | ExponentialGrowth | Constant | MixIn | RandomTeacher | Adaptive,
    Field(discriminator="type"),
]


class Divergence(Config):
    """D(p‖q): p is the teacher, q the student."""

    name: Literal["forward_kl", "reverse_kl", "skewed_kl", "skewed_reverse_kl", "jsd", "total_variation"] = (
        "skewed_reverse_kl"
    )
    """Which member of the family."""
    alpha: float = Field(default=0.1, ge=0, lt=1)
    """Skew."""
    beta: float = Field(default=0.5, ge=0, le=1)
    """JSD's weight of the teacher."""


class Sft(Config):
    """Cross entropy on annotated text."""

    type: Literal["sft"] = "sft"


class Switch(Config):
    """SWITCH (Koo et al. 2025): the student writes, the teacher intervenes, and a divergence is minimised on the mixed
    sequences and on annotated ones."""

    type: Literal["switch"] = "switch"
    gate: Gate = ExponentialDecay()
    """When the teacher writes the token."""
    jsd_log_base: float = Field(default=2.0, gt=1)
    """Base of the Jensen-Shannon divergence that the gate compares with its threshold."""
    divergence: Divergence = Divergence()
    """What is minimised."""
    on_policy_share: float = Field(default=0.5, ge=0, le=1)
    """Probability that a sequence of a batch is rolled out; the others are annotated rows."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest rollout."""
    decoder: Literal["blockwise", "reference"] = "blockwise"
    """Both write the same tokens; ``reference`` asks both models for every one."""
    block: int | None = Field(default=None, ge=1)
    """Tokens that ``blockwise`` drafts at once. Absent: by measured speed, so two runs differ in rounding."""
    temperature: float = Field(default=1.0, gt=0, le=2)
    """Sampling temperature of rollouts."""


Method = Annotated[Sft | Switch, Field(discriminator="type")]


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

    @model_validator(mode="after")
    def _batches_fit(self) -> "TrainConfig":
        if self.batch_size % min(self.micro_batch, self.batch_size):
            raise ValueError(f"micro_batch {self.micro_batch} does not divide batch_size {self.batch_size}")
        return self

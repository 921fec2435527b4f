"""Methods: what is minimised, on which sequences (method.md, sections 1 and 4). p is the teacher, q the student.

Every method says of itself whether it ``compares`` distributions, so that it needs a teacher of the student's family,
how much of a batch the student writes, and (``keeps_rollouts``) whether it trains on a rollout more than once.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

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


class OnText(Config):
    """A method that reads annotated text only."""

    compares: ClassVar[bool] = False
    keeps_rollouts: ClassVar[bool] = False
    asks_teacher: ClassVar[bool] = False
    in_blocks: ClassVar[bool] = True
    on_policy_share: ClassVar[float] = 0.0
    rollout_share: ClassVar[float] = 0.0
    max_new_tokens: ClassVar[int] = 0


class Compares(Config):
    """A method that compares distributions."""

    compares: ClassVar[bool] = True
    keeps_rollouts: ClassVar[bool] = False
    in_blocks: ClassVar[bool] = True
    annotated: Literal["live", "stored"] = "live"
    """Where the teacher's distributions at annotated rows come from: asked in training, or kept by the annotation
    (``sampling.distributions``)."""

    @property
    def asks_teacher(self) -> bool:
        """Whether training needs the teacher itself, beside what annotation kept of it."""
        return self.annotated == "live"


class RollsOut(Compares):
    """A method that rolls out."""

    max_new_tokens: int = Field(default=128, ge=1)
    """Longest rollout."""

    @property
    def asks_teacher(self) -> bool:
        """Always: it reads the rollouts."""
        return True


class OnPolicy(RollsOut):
    """A method that trains on each rollout once."""

    on_policy_share: float = Field(default=0.5, ge=0, le=1)
    """Probability that a sequence of a batch is rolled out; the others are annotated rows."""
    temperature: float = Field(default=1.0, gt=0, le=2)
    """Sampling temperature of rollouts."""

    @property
    def rollout_share(self) -> float:
        """Rollouts per sequence of a batch, on average."""
        return self.on_policy_share


class Sft(OnText):
    """Cross entropy on annotated text."""

    type: Literal["sft"] = "sft"


class Seqkd(OnText):
    """Sequence-level distillation (Kim and Rush 2016): cross entropy on text the teacher sampled. Here all annotated
    text is; the name is kept apart for readers of reports."""

    type: Literal["seqkd"] = "seqkd"


class Kd(Compares):
    """Word-level distillation: KL(p‖q) on annotated text, mixed with cross entropy if asked."""

    on_policy_share: ClassVar[float] = 0.0
    rollout_share: ClassVar[float] = 0.0
    max_new_tokens: ClassVar[int] = 0
    type: Literal["kd"] = "kd"
    cross_entropy_share: float = Field(default=0.0, ge=0, le=1)
    """Weight of the cross entropy; KL(p‖q) has the rest. MiniLLM's code has 0.5."""


class Imitkd(OnPolicy):
    """ImitKD (Lin et al. 2020): KL(p‖q) on text the student sampled."""

    type: Literal["imitkd"] = "imitkd"
    on_policy_share: float = Field(default=1.0, ge=0, le=1)
    """Probability that a sequence of a batch is rolled out; the others are annotated rows."""


class Gkd(OnPolicy):
    """GKD (Agarwal et al. 2024): generalised JSD on text that is sampled by the student or annotated."""

    type: Literal["gkd"] = "gkd"
    divergence: Divergence = Divergence(name="jsd")
    """What is minimised."""


class Minillm(RollsOut):
    """MiniLLM (Gu et al. 2024): student and teacher write a collection of sequences together, and several steps follow
    the policy gradient on them, with KL(q‖p) at single steps beside it."""

    keeps_rollouts: ClassVar[bool] = True
    # The importance weight is that of untempered draws.
    temperature: ClassVar[float] = 1.0
    type: Literal["minillm"] = "minillm"
    on_policy_share: float = Field(default=1.0, ge=0, le=1)
    """Share of a batch that comes from the collection. The others are annotated rows, which carry the
    language-modelling term: none by default."""
    teacher_share: float = Field(default=0.2, ge=0, lt=1)
    """Each token is drawn from teacher_share·p + (1 − teacher_share)·q."""
    reward_scale: float = Field(default=0.5, gt=0)
    """A token's reward is log p − log q over this."""
    reward_limit: float = Field(default=100.0, gt=0)
    """Rewards are cut at this, either way."""
    discount: float = Field(default=0.95, ge=0, le=1)
    """Of the next token's reward against this one's."""
    own_reward: bool = True
    """Whether a token's return begins with its own reward (MiniLLM's code) or with the next one's (its paper)."""
    clip: float = Field(default=0.2, gt=0, lt=1)
    """PPO's: q over the law that was drawn from counts only within 1 ± clip."""
    collected_batches: int = Field(default=4, ge=1)
    """Batches of sequences that are rolled out at once: 256 sequences by batches of 64 in the paper."""
    epochs: int = Field(default=4, ge=1)
    """How often the collection is gone through before the next one."""
    language_weight: float = Field(default=1.0, ge=0)
    """Weight of the language-modelling term, on annotated rows."""
    cross_entropy_share: float = Field(default=0.5, ge=0, le=1)
    """Its share of cross entropy; KL(p‖q) has the rest."""
    block: int | None = Field(default=None, ge=1)
    """Tokens drafted at once. Absent: by measured speed, so two runs differ in rounding."""
    slots: int | None = Field(default=None, ge=1)
    """Rollouts written at once, to bound memory; as one ends the next one joins. Absent: all. Changes no token."""

    @property
    def rollout_share(self) -> float:
        """Rollouts per sequence of a batch, on average."""
        return self.on_policy_share / self.epochs


class Distillm(RollsOut):
    """DistiLLM (Ko et al. 2024): a skewed divergence on annotated rows and, ever more often, on what the student wrote,
    now or before. φ, that share, grows where the validation cross entropy does."""

    keeps_rollouts: ClassVar[bool] = True
    # What φ can come to: the share of rollouts falls to 0 along the training.
    on_policy_share: ClassVar[float] = 1.0
    rollout_share: ClassVar[float] = 0.5
    type: Literal["distillm"] = "distillm"
    divergence: Divergence = Divergence()
    """What is minimised: skewed_kl or skewed_reverse_kl, by the paper."""
    temperature: float = Field(default=1.0, gt=0, le=2)
    """Sampling temperature of rollouts."""
    first_share: float = Field(default=0.0, ge=0, le=1)
    """φ at the start."""
    share_step: float = Field(default=0.1, gt=0, le=1)
    """What φ grows by, to at most 1."""
    rise: float = Field(default=0.1, ge=0)
    """φ grows when the validation cross entropy is so much, in nats a token, above what it was when φ last grew."""
    capacity: int = Field(default=1000, ge=1)
    """Sequences the replay buffer holds; the oldest leave it first."""


class Skd(OnPolicy):
    """Speculative KD (Xu et al. 2025): the student drafts, the teacher draws anew what is not among its best tokens;
    KL(p‖q) on the result."""

    type: Literal["skd"] = "skd"
    on_policy_share: float = Field(default=1.0, ge=0, le=1)
    """Probability that a sequence of a batch is rolled out; the others are annotated rows."""
    top_k: int = Field(default=25, ge=1)
    """A drafted token stays if it is among so many of the teacher's best."""
    block: int | None = Field(default=5, ge=1)
    """Tokens drafted at once. Absent: by measured speed."""
    slots: int | None = Field(default=None, ge=1)
    """Rollouts written at once, to bound memory; as one ends the next one joins. Absent: all. Changes no token."""
    temperature: float = Field(default=0.5, gt=0, le=2)
    """The student's."""
    top_p: float = Field(default=0.5, gt=0, le=1)
    """The student's nucleus."""
    teacher_temperature: float = Field(default=0.2, gt=0, le=2)
    """The teacher's."""
    teacher_top_p: float = Field(default=0.5, gt=0, le=1)
    """The teacher's nucleus."""


class Opd(OnPolicy):
    """On-policy distillation: policy gradient at each token the student drew, its advantage log p − log q there, later
    ones discounted by 0; cross entropy on annotated rows, if any are mixed in."""

    type: Literal["opd"] = "opd"
    on_policy_share: float = Field(default=1.0, ge=0, le=1)
    """Probability that a sequence of a batch is rolled out; the others are annotated rows."""
    temperature: float = Field(default=1.0, ge=1, le=1)
    """Rollouts are drawn from the student as it is, so that every importance weight is 1."""


class Switch(OnPolicy):
    """SWITCH (Koo et al. 2025): the student writes, the teacher intervenes, and a divergence is minimised on the mixed
    sequences and on annotated ones."""

    type: Literal["switch"] = "switch"
    gate: Gate = ExponentialDecay()
    """When the teacher writes the token."""
    jsd_log_base: float = Field(default=2.0, gt=1)
    """Base of the Jensen-Shannon divergence that the gate compares with its threshold."""
    divergence: Divergence = Divergence()
    """What is minimised."""
    decoder: Literal["blockwise", "reference", "vllm"] = "blockwise"
    """All write the same tokens; ``reference`` asks both models for every one, ``vllm`` is ``blockwise`` inside vLLM,
    on CPU, with the versions it was tested with and after a check of its tokens, else ``blockwise`` and a warning."""
    sync_every: int = Field(default=1, ge=1)
    """With ``vllm``: batches of rollouts between two updates of the student's weights there; with more than 1 rollouts
    are by an older student, and a resumed run's differ."""
    block: int | None = Field(default=None, ge=1)
    """Tokens drafted at once. Absent: by measured speed, so two runs differ in rounding (8 in vLLM)."""
    slots: int | None = Field(default=None, ge=1)
    """Rollouts that ``blockwise`` writes at once, to bound memory; as one ends the next one joins. Absent: all. Changes
    no token."""

    @property
    def in_blocks(self) -> bool:  # type: ignore[override]
        """Whether its decoder scores blocks, as a teacher that is served can."""
        return self.decoder == "blockwise"


Method = Annotated[
    Sft | Seqkd | Kd | Imitkd | Gkd | Minillm | Distillm | Skd | Opd | Switch, Field(discriminator="type")
]

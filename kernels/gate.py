"""The gate: who writes a response position, the student or the teacher. Imports no torch.

SWITCH (method.md, section 1): with p = teacher, q = student and m = (p + q) / 2,

    JSD_t = 1/2 KL(p || m) + 1/2 KL(q || m),    JSD_t <= tau_t  ->  the student writes (ties too), else the teacher,

on the full vocabulary at temperature 1, log base 2 unless `log_base` says otherwise (natural logarithms with
tau_0 = ln 2 decide the same). t counts response positions from 0. The thresholds look at the prefix alone, so teacher
and student may share their noise; `Coin` tosses its own coin, and `InTopK` looks at the draw, so it needs teacher
noise of its own. `decide` is the one decision function of all decoders.

Shapes: B rows, T response positions, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


def divergences(teacher_logprobs: Tensor, student_logprobs: Tensor, log_base: float = 2.0) -> tuple[Tensor, Tensor]:
    """(JSD in units of `log_base`, KL(p || q) in nats), each [...], from finite log-probabilities [..., V].

    With d = log q - log p and s = log((1 + e^d) / 2), log p - log m = -s and log q - log m = d - s. Written so, a JSD
    near 0 keeps its relative precision: tau_t falls to 1e-6 within 140 positions.
    """
    p, q = teacher_logprobs.exp(), student_logprobs.exp()
    gap = student_logprobs - teacher_logprobs
    kl = -(p * gap).sum(-1)
    gap.clamp_(-40.0, 40.0)  # beyond, p or q is nothing beside the other
    excess = gap.expm1().mul_(0.5).log1p_()
    # In place: this runs for every position that is drafted.
    nats = 0.5 * gap.mul_(q).addcmul_(q.add_(p), excess, value=-1).sum(-1)
    return (nats / math.log(log_base)).clamp(0.0, math.log(2.0) / math.log(log_base)), kl


def jsd(teacher_logprobs: Tensor, student_logprobs: Tensor, log_base: float = 2.0) -> Tensor:
    """Jensen–Shannon divergence [...] of log-probabilities [..., V]; between 0 and 1 in base 2."""
    return divergences(teacher_logprobs, student_logprobs, log_base)[0]


@dataclass(frozen=True, slots=True)
class Sight:
    """What a gate may look at, at one response position of each row."""

    position_B: Tensor  # t, int64
    jsd_B: Tensor  # in the gate's log base
    kl_B: Tensor  # KL(p || q), nats
    coin_B: Tensor  # uniform in (0, 1), from a stream of its own
    teacher_logprobs_BV: Tensor  # temperature 1
    draft_B: Tensor  # the student's draw
    earlier_kl_BT: Tensor  # the same row's KL at positions before t; anything from t on
    earlier_teacher_BT: Tensor  # where the teacher wrote before t; anything from t on


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """The student writes where JSD_t <= tau_t. Subclasses give tau_t; it never falls below `floor`."""

    own_teacher_noise: ClassVar[bool] = False
    floor: float = 0.0
    log_base: float = 2.0

    def __post_init__(self) -> None:
        if not self.floor >= 0 or not self.log_base > 1:
            raise ValueError(f"{self}: needs floor >= 0 and log_base > 1")

    def shape(self, position_B: Tensor) -> Tensor:
        raise NotImplementedError

    def tau(self, position_B: Tensor) -> Tensor:
        """tau_t in float64, whatever the models' precision."""
        return self.shape(position_B.double()).clamp(min=self.floor)

    def teacher_writes(self, sight: Sight) -> Tensor:
        return ~(sight.jsd_B.double() <= self.tau(sight.position_B))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExponentialDecay(Threshold):
    """tau_t = start · exp(-rate · t): SWITCH's own."""

    start: float = 1.0
    rate: float = 0.1

    def shape(self, position_B: Tensor) -> Tensor:
        return self.start * (-self.rate * position_B).exp()


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearDecay(Threshold):
    """tau_t = 1 - t / length: from 1 to 0 over the maximum length."""

    length: int

    def __post_init__(self) -> None:
        Threshold.__post_init__(self)
        if self.length < 1:
            raise ValueError(f"{self}: needs length >= 1, the maximum length of a response")

    def shape(self, position_B: Tensor) -> Tensor:
        return 1.0 - position_B / self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class ExponentialGrowth(Threshold):
    """tau_t = 1 - exp(-rate · t)."""

    rate: float = 0.1

    def shape(self, position_B: Tensor) -> Tensor:
        return 1.0 - (-self.rate * position_B).exp()


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant(Threshold):
    """tau_t = value."""

    value: float = 0.2

    def shape(self, position_B: Tensor) -> Tensor:
        return position_B * 0.0 + self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Coin:
    """The teacher writes with probability `teacher_share`, by an independent coin: the law is (1 - a) q + a p.

    MiniLLM's mix-in is 0.2; SWITCH's ablation of a random teacher is 0.5.
    """

    own_teacher_noise: ClassVar[bool] = False
    log_base: ClassVar[float] = 2.0
    teacher_share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.teacher_share <= 1:
            raise ValueError(f"{self}: teacher_share is a probability")

    def teacher_writes(self, sight: Sight) -> Tensor:
        return sight.coin_B < self.teacher_share


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptive:
    """AdaSwitch: once KL(p || q) exceeds `factor` times its mean over the `window` positions before, the teacher
    writes that position and all the rest. No switch before the window is full. (factor and window: our choice.)
    """

    own_teacher_noise: ClassVar[bool] = False
    log_base: ClassVar[float] = 2.0
    factor: float = 3.0
    window: int = 8

    def __post_init__(self) -> None:
        if not self.factor > 0 or self.window < 1:
            raise ValueError(f"{self}: needs factor > 0 and window >= 1")

    def teacher_writes(self, sight: Sight) -> Tensor:
        width, t_B1 = sight.earlier_kl_BT.shape[1], sight.position_B[:, None]
        steps_T = sight.position_B.new_ones(width).cumsum(0) - 1
        switched_B = (sight.earlier_teacher_BT & (steps_T < t_B1)).any(1)
        in_window_BT = (steps_T < t_B1) & (steps_T >= t_B1 - self.window)
        mean_B = sight.earlier_kl_BT.masked_fill(~in_window_BT, 0.0).sum(1) / self.window
        return switched_B | ((sight.position_B >= self.window) & (sight.kl_B > self.factor * mean_B))


@dataclass(frozen=True, slots=True, kw_only=True)
class InTopK:
    """Speculative KD: the student's draft stays if it is among the teacher's `k` best, else the teacher draws anew."""

    own_teacher_noise: ClassVar[bool] = True
    log_base: ClassVar[float] = 2.0
    k: int = 25

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"{self}: k is at least 1")

    def teacher_writes(self, sight: Sight) -> Tensor:
        draft_logprob_B1 = sight.teacher_logprobs_BV.gather(-1, sight.draft_B[:, None])
        return (sight.teacher_logprobs_BV > draft_logprob_B1).sum(-1) >= self.k


Gate = Threshold | Coin | Adaptive | InTopK


def decide(gate: Gate, sight: Sight) -> Tensor:
    """True [B] where the teacher writes. Pure: the same sight, the same decision, in every decoder."""
    return gate.teacher_writes(sight)

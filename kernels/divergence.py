"""Divergences between a teacher's and a student's next-token distributions, in plain tensor operations.

p is the teacher, q the student. One family covers every Kullback-Leibler loss:

    D = Σ_terms weight · KL(A ‖ B),   A ∈ {p, q},   B = c·p + (1 − c)·q

    forward_kl            KL(p ‖ q)
    reverse_kl            KL(q ‖ p)
    skewed_kl(α)          KL(p ‖ α·p + (1−α)·q)
    skewed_reverse_kl(α)  KL(q ‖ (1−α)·p + α·q)
    jsd(β)                β·KL(p ‖ M) + (1−β)·KL(q ‖ M),  M = β·p + (1−β)·q;  β = 0 is KL(p ‖ q), β = 1 is KL(q ‖ p)

Total variation, ½ Σ|p − q|, stands apart. The functions here are the reference; `kernels/fused.py` is what trains.
The gradient flows through q in A and in B, never into the teacher. Values are in nats. This module does not import
torch (it only calls methods of tensors), so settings may import `Divergence` from it for free.

Shape legend: N positions, V vocabulary, K stored teacher tokens of a position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

# A probability of zero counts as exp(LOG_ZERO), which is 0 in every float type. So 0·log 0 is 0, and a divergence that
# is infinite (q where p is zero) comes out large and finite, with a gradient that points the right way.
LOG_ZERO = -1e4


@dataclass(frozen=True)
class Term:
    """weight · KL(A ‖ B): A is `first` ("p" teacher, "q" student), B = teacher_share·p + (1 − teacher_share)·q."""

    weight: float
    first: Literal["p", "q"]
    teacher_share: float


@dataclass(frozen=True)
class Divergence:
    """A weighted sum of Kullback-Leibler terms, plus `variation` times the total variation."""

    terms: tuple[Term, ...] = ()
    variation: float = 0.0

    @property
    def impossible(self) -> float:
        """κ, where κ·q is the summand of a token with p = 0; terms for which it is infinite (B = p) count as 0."""
        led_by_q = (term for term in self.terms if term.first == "q" and term.teacher_share < 1.0)
        return 0.5 * self.variation - sum(term.weight * math.log1p(-term.teacher_share) for term in led_by_q)


def forward_kl() -> Divergence:
    """KL(p ‖ q), word-level knowledge distillation."""
    return Divergence((Term(1.0, "p", 0.0),))


def reverse_kl() -> Divergence:
    """KL(q ‖ p)."""
    return Divergence((Term(1.0, "q", 1.0),))


def skewed_kl(alpha: float = 0.1) -> Divergence:
    """KL(p ‖ α·p + (1−α)·q), 0 ≤ α < 1 (DistiLLM)."""
    return Divergence((Term(1.0, "p", _fraction("alpha", alpha, below_one=True)),))


def skewed_reverse_kl(alpha: float = 0.1) -> Divergence:
    """KL(q ‖ (1−α)·p + α·q), 0 ≤ α < 1 (DistiLLM; SWITCH's main loss)."""
    return Divergence((Term(1.0, "q", 1.0 - _fraction("alpha", alpha, below_one=True)),))


def jsd(beta: float = 0.5) -> Divergence:
    """Generalised Jensen-Shannon with β on the teacher, 0 ≤ β ≤ 1 (GKD; DistiLLM's "0.9" is β = 0.1 here)."""
    beta = _fraction("beta", beta)
    # The formula itself tends to 0 at both ends; by definition they are the two plain divergences.
    if beta == 0.0:
        return forward_kl()
    if beta == 1.0:
        return reverse_kl()
    return Divergence((Term(beta, "p", beta), Term(1.0 - beta, "q", beta)))


def total_variation() -> Divergence:
    """½ Σ|p − q|."""
    return Divergence(variation=1.0)


NAMES = ("forward_kl", "reverse_kl", "skewed_kl", "skewed_reverse_kl", "jsd", "total_variation")


def named(name: str, *, alpha: float = 0.1, beta: float = 0.5) -> Divergence:
    """The divergence a settings file names; `alpha` is used by the skewed ones, `beta` by `jsd`.

    Raises ValueError for a name that is not in `NAMES` and for coefficients out of range.
    """
    match name:
        case "forward_kl":
            return forward_kl()
        case "reverse_kl":
            return reverse_kl()
        case "skewed_kl":
            return skewed_kl(alpha)
        case "skewed_reverse_kl":
            return skewed_reverse_kl(alpha)
        case "jsd":
            return jsd(beta)
        case "total_variation":
            return total_variation()
    raise ValueError(f"no divergence is called {name!r}: use one of {', '.join(NAMES)}")


def divergence_N(
    teacher_logits_NV: Tensor, student_logits_NV: Tensor, divergence: Divergence, temperature: float = 1.0
) -> Tensor:
    """D(p, q) of each position in nats, p and q both at `temperature` (without the T² factor some papers add).

    Logits may be −inf. Raises ValueError where the vocabularies differ.
    """
    if teacher_logits_NV.shape[-1] != student_logits_NV.shape[-1]:
        raise ValueError(
            f"teacher and student score {teacher_logits_NV.shape[-1]} and {student_logits_NV.shape[-1]} tokens: "
            "cut both output projections to the ids the tokenizers share"
        )
    log_p_NV = log_softmax(teacher_logits_NV.detach(), temperature)
    log_q_NV = log_softmax(student_logits_NV, temperature)
    return pointwise(log_p_NV, log_q_NV, divergence).sum(-1)


def topk_divergence_N(
    ids_NK: Tensor,
    logprobs_NK: Tensor,
    log_tail_N: Tensor,
    student_logits_NV: Tensor,
    divergence: Divergence,
    temperature: float = 1.0,
) -> Tensor:
    """D of each position, the teacher known at K tokens and everything else being one bucket of mass exp(log_tail).

    Never above the divergence over the full vocabulary (merging tokens loses information), and equal to it at K = V.
    The ids of a position are distinct; a slot with log-probability −inf is padding, and its id is ignored.
    `temperature` is the student's: the teacher's log-probabilities are taken as they are.
    """
    log_q_NV = log_softmax(student_logits_NV, temperature)
    log_p_NK, log_q_NK = _slots(ids_NK, logprobs_NK, log_q_NV)
    kept_NK = logprobs_NK > -math.inf
    rows, slots = kept_NK.nonzero(as_tuple=True)
    stored_NV = kept_NK.new_zeros(log_q_NV.shape)
    stored_NV[rows, ids_NK[rows, slots]] = True
    # Summed over the rest rather than as 1 − Σ, which loses every digit of a small tail.
    log_q_tail_N1 = log_q_NV.masked_fill(stored_NV, LOG_ZERO).logsumexp(-1, keepdim=True)
    log_p_tail_N1 = log_tail_N.to(log_p_NK.dtype).clamp(min=LOG_ZERO)[:, None]
    tail_N = pointwise(log_p_tail_N1, log_q_tail_N1, divergence).sum(-1)
    return pointwise(log_p_NK, log_q_NK, divergence).sum(-1) + tail_N


def sampled_divergence_N(
    ids_NK: Tensor,
    logprobs_NK: Tensor,
    importance_NK: Tensor,
    student_logits_NV: Tensor,
    divergence: Divergence,
    temperature: float = 1.0,
) -> Tensor:
    """Unbiased estimate of each position's D from tokens drawn off the teacher's distribution (`codec.encode_sampled`).

    With d(p, q) the summand of D, and d(0, q) = κ·q that of a token impossible for the teacher,

        D̂ = κ + Σ_k importance_k · (d(p_k, q_k) − κ·q_k)

    where importance is 1 for a token stored for certain, and times drawn / times expected for a drawn one. As Σ_v q_v
    is 1, the mean of D̂ is Σ_v d(p_v, q_v), and its gradient's mean is D's gradient. Taking κ out bounds what a drawn
    token adds by a multiple of its p, however large its q is. Only KL(q ‖ p), whose κ is infinite, does without: it
    needs p > 0 and spreads widely. A single estimate may be negative.
    Padding and `temperature` are as in `topk_divergence_N`.
    """
    log_p_NK, log_q_NK = _slots(ids_NK, logprobs_NK, log_softmax(student_logits_NV, temperature))
    impossible = divergence.impossible
    summands_NK = pointwise(log_p_NK, log_q_NK, divergence) - impossible * log_q_NK.exp()
    return impossible + (importance_NK.to(summands_NK.dtype) * summands_NK).sum(-1)


def pointwise(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """The summands of D for log-probabilities of any one shape, none below `LOG_ZERO`."""
    p, q = log_p.exp(), log_q.exp()
    summands = divergence.variation * 0.5 * (p - q).abs()
    for term in divergence.terms:
        log_b = log_mixture(log_p, log_q, term.teacher_share)
        first, log_first = (p, log_p) if term.first == "p" else (q, log_q)
        summands = summands + term.weight * first * (log_first - log_b)
    return summands


def log_softmax(logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities at `temperature`, at least in float32 and not below `LOG_ZERO`."""
    logits_NV = logits_NV if logits_NV.element_size() > 4 else logits_NV.float()
    return (logits_NV if temperature == 1.0 else logits_NV / temperature).log_softmax(-1).clamp(min=LOG_ZERO)


def log_mixture(log_p: Tensor, log_q: Tensor, teacher_share: float) -> Tensor:
    """log(c·p + (1 − c)·q) of each entry, exact at c = 0 and c = 1."""
    if teacher_share == 0.0:
        return log_q
    if teacher_share == 1.0:
        return log_p
    return (log_p + math.log(teacher_share)).logaddexp(log_q + math.log1p(-teacher_share))


def _slots(ids_NK: Tensor, logprobs_NK: Tensor, log_q_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Teacher's and student's log-probabilities of the stored tokens, both zero probability in padded slots."""
    padding_NK = logprobs_NK == -math.inf
    log_q_NK = log_q_NV.gather(-1, ids_NK.masked_fill(padding_NK, 0)).masked_fill(padding_NK, LOG_ZERO)
    return logprobs_NK.to(log_q_NV.dtype).clamp(min=LOG_ZERO), log_q_NK


def _fraction(name: str, value: float, below_one: bool = False) -> float:
    if not 0.0 <= value <= 1.0 or (below_one and value == 1.0):
        raise ValueError(f"{name} is {value}: choose it from 0 to 1{', below 1' if below_one else ''}")
    return float(value)

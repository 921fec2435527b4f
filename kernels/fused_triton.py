"""The vocabulary-wide part of a fused divergence as one Triton kernel: two rows of logits in, loss and gradient out.

`kernels/fused.py` takes it for CUDA tensors; what it does elsewhere is the reference, and gives the formulas. A program
handles one position and walks the vocabulary three times: online softmax statistics of both models; D and the total of
u; and the gradient, written over the student's logits. No temporary of the vocabulary's size exists.

    python -m pytest tests/kernels/test_fused_triton.py     (in Triton's interpreter, no GPU needed)

Shape legend: C positions of a chunk, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.divergence import LOG_ZERO, Divergence

# Most tokens a program holds at once, and its warps. At 64 to 76 registers a thread on sm_90 nothing spills.
BLOCK, WARPS = 2048, 8


def divergence_(
    student_CV: Tensor,
    teacher_CV: Tensor,
    scale_C: Tensor,
    divergence: Divergence,
    temperature: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
) -> Tensor:
    """D of each position in nats; `student_CV` becomes scale · ∂D/∂(raw student logits), `teacher_CV` is only read.

    Logits come raw (before cap and temperature), in any float type; arithmetic is in the type of `scale_C`.
    """
    assert student_CV.shape == teacher_CV.shape
    assert student_CV.stride(1) == teacher_CV.stride(1) == 1
    shares = tuple(dict.fromkeys(term.teacher_share for term in divergence.terms))
    # For each distinct B the summed weights of the terms that p leads, and of those that q leads.
    on_p, on_q = (
        tuple(
            sum(t.weight for t in divergence.terms if (t.first, t.teacher_share) == (first, share)) for share in shares
        )
        for first in "pq"
    )
    losses_C = torch.empty_like(scale_C)
    positions, vocabulary = student_CV.shape
    divergence_kernel[(positions,)](
        student_CV,
        teacher_CV,
        scale_C,
        losses_C,
        student_CV.stride(0),
        teacher_CV.stride(0),
        vocabulary,
        1.0 / temperature,
        STUDENT_CAP=student_softcap or 0.0,
        TEACHER_CAP=teacher_softcap or 0.0,
        SHARES=shares,
        ON_P=on_p,
        ON_Q=on_q,
        VARIATION=divergence.variation,
        FLOOR=LOG_ZERO,
        TINY=torch.finfo(scale_C.dtype).tiny,
        BLOCK=min(BLOCK, triton.next_power_of_2(vocabulary)),
        num_warps=WARPS,
    )
    return losses_C


@triton.jit
def capped(raw, CAP: tl.constexpr):
    """CAP · tanh(raw / CAP), by an exponential whose overflow is harmless."""
    if CAP > 0.0:
        raw = CAP * (1.0 - 2.0 / (tl.exp(2.0 * raw / CAP) + 1.0))
    return raw


@triton.jit
def kullback_leibler(
    log_p, p, log_q, q, SHARE: tl.constexpr, ON_P: tl.constexpr, ON_Q: tl.constexpr, TINY: tl.constexpr
):
    """Summand and slope of ON_P · KL(p ‖ B) + ON_Q · KL(q ‖ B)."""
    if SHARE == 0.0:
        log_b = log_q
        overlap = p
    elif SHARE == 1.0:
        log_b = log_p
        overlap = q
    else:
        b = tl.maximum(SHARE * p + (1.0 - SHARE) * q, TINY)
        log_b = tl.log(b)
        overlap = p * q / b
    led_by_q = ON_Q * q * (log_q - log_b)
    return ON_P * p * (log_p - log_b) + led_by_q, led_by_q + (ON_Q * SHARE - ON_P * (1.0 - SHARE)) * overlap


@triton.jit
def summand_and_slope(
    log_p,
    log_q,
    SHARES: tl.constexpr,
    ON_P: tl.constexpr,
    ON_Q: tl.constexpr,
    VARIATION: tl.constexpr,
    TINY: tl.constexpr,
):
    """The summand of D, and u = q · ∂D/∂q."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    summand = 0.5 * VARIATION * tl.abs(p - q)
    slope = 0.5 * VARIATION * q * tl.where(q > p, 1.0, tl.where(q < p, -1.0, 0.0))
    for i in tl.static_range(len(SHARES)):
        more_summand, more_slope = kullback_leibler(log_p, p, log_q, q, SHARES[i], ON_P[i], ON_Q[i], TINY)
        summand += more_summand
        slope += more_slope
    return summand, slope


@triton.jit
def divergence_kernel(
    student_ptr,
    teacher_ptr,
    scale_ptr,
    losses_ptr,
    student_stride,
    teacher_stride,
    vocabulary,
    inverse_temperature,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    SHARES: tl.constexpr,
    ON_P: tl.constexpr,
    ON_Q: tl.constexpr,
    VARIATION: tl.constexpr,
    FLOOR: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    scale = tl.load(scale_ptr + row)
    dtype = scale.dtype
    lanes = tl.arange(0, BLOCK)

    # The maxima start finite, not at −inf, so that a first block of impossible tokens is no −inf − (−inf).
    student_max, student_sum = tl.full([], -1e30, dtype), tl.full([], 0.0, dtype)
    teacher_max, teacher_sum = tl.full([], -1e30, dtype), tl.full([], 0.0, dtype)
    for start in range(0, vocabulary, BLOCK):
        inside = start + lanes < vocabulary
        student = tl.load(student_ptr + start + lanes, mask=inside, other=0.0).to(dtype)
        teacher = tl.load(teacher_ptr + start + lanes, mask=inside, other=0.0).to(dtype)
        student = tl.where(inside, capped(student, STUDENT_CAP) * inverse_temperature, float("-inf"))
        teacher = tl.where(inside, capped(teacher, TEACHER_CAP) * inverse_temperature, float("-inf"))
        new_max = tl.maximum(student_max, tl.max(student, 0))
        student_sum = student_sum * tl.exp(student_max - new_max) + tl.sum(tl.exp(student - new_max), 0)
        student_max = new_max
        new_max = tl.maximum(teacher_max, tl.max(teacher, 0))
        teacher_sum = teacher_sum * tl.exp(teacher_max - new_max) + tl.sum(tl.exp(teacher - new_max), 0)
        teacher_max = new_max
    student_lse = student_max + tl.log(student_sum)
    teacher_lse = teacher_max + tl.log(teacher_sum)

    loss, total = tl.full([], 0.0, dtype), tl.full([], 0.0, dtype)
    for start in range(0, vocabulary, BLOCK):
        inside = start + lanes < vocabulary
        student = tl.load(student_ptr + start + lanes, mask=inside, other=0.0).to(dtype)
        teacher = tl.load(teacher_ptr + start + lanes, mask=inside, other=0.0).to(dtype)
        log_q = tl.maximum(capped(student, STUDENT_CAP) * inverse_temperature - student_lse, FLOOR)
        log_p = tl.maximum(capped(teacher, TEACHER_CAP) * inverse_temperature - teacher_lse, FLOOR)
        summand, slope = summand_and_slope(log_p, log_q, SHARES, ON_P, ON_Q, VARIATION, TINY)
        loss += tl.sum(tl.where(inside, summand, 0.0), 0)
        total += tl.sum(tl.where(inside, slope, 0.0), 0)
    tl.store(losses_ptr + row, loss)

    for start in range(0, vocabulary, BLOCK):
        inside = start + lanes < vocabulary
        raw = tl.load(student_ptr + start + lanes, mask=inside, other=0.0).to(dtype)
        teacher = tl.load(teacher_ptr + start + lanes, mask=inside, other=0.0).to(dtype)
        student = capped(raw, STUDENT_CAP)
        log_q = tl.maximum(student * inverse_temperature - student_lse, FLOOR)
        log_p = tl.maximum(capped(teacher, TEACHER_CAP) * inverse_temperature - teacher_lse, FLOOR)
        _, slope = summand_and_slope(log_p, log_q, SHARES, ON_P, ON_Q, VARIATION, TINY)
        gradient = (slope - tl.exp(log_q) * total) * scale * inverse_temperature
        if STUDENT_CAP > 0.0:
            gradient *= 1.0 - (student / STUDENT_CAP) * (student / STUDENT_CAP)
        tl.store(student_ptr + start + lanes, gradient.to(student_ptr.dtype.element_ty), mask=inside)

"""Losses fused with the output projection: divergences and cross entropy from hidden states, in little memory.

Every loss is a sum, Σ_n weights_n · D_n; the caller divides by the global count of tokens, so that chunks,
micro-batches and ranks change nothing. Positions of weight 0 cost nothing. No gradient reaches the teacher or the
positions' weights. Arithmetic is in float32 (float64 for float64 hidden states), whatever the inputs' type. Projection
weights are plain tensors: under FSDP2 the caller passes `weight.full_tensor()`, whose backward sends the gradient to
the shards. A soft cap c makes logits c·tanh(z/c).

The gradient with respect to logits z is in closed form. With B = c·p + (1−c)·q and u_v = q_v · ∂D/∂q_v,

    KL(p ‖ B):  u = −(1−c) · pq/B
    KL(q ‖ B):  u = q · log(q/B) + c · pq/B
    ½ Σ|p−q|:   u = ½ q · sign(q−p)
    ∂D/∂z_v = u_v − q_v · Σ_w u_w

Shape legend: N positions, C positions of a chunk, R of a block (`kernels/projection.py`), V vocabulary, H student
width, G teacher width, K stored teacher tokens of a position.
"""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor

from kernels.divergence import LOG_ZERO, Divergence
from kernels.projection import Scratch, by_blocks, project_, projected_loss, same_length, temper_


def fused_divergence(
    student_hidden_NH: Tensor,
    student_weight_VH: Tensor,
    teacher_hidden_NG: Tensor,
    teacher_weight_VG: Tensor,
    weights_N: Tensor,
    divergence: Divergence,
    *,
    student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(Σ weights · D, D of each position without gradient): the full-vocabulary `divergence.divergence_N`, in nats.

    D is 0 where the weight is. `chunk_size` (positions; by default from the memory of a chunk) changes no result.
    Raises ValueError where shapes disagree.
    """
    if teacher_weight_VG.shape[0] != student_weight_VH.shape[0]:
        raise ValueError(
            f"teacher and student score {teacher_weight_VG.shape[0]} and {student_weight_VH.shape[0]} tokens: "
            "cut both output projections to the ids the tokenizers share"
        )
    same_length(student_hidden_NH, teacher_hidden_NG=teacher_hidden_NG)
    scratch = Scratch()

    def objective(logits_CV: Tensor, rows_C: Tensor, scale_C: Tensor) -> Tensor:
        teacher_CV = scratch.like("teacher", logits_CV)
        project_(teacher_CV, teacher_hidden_NG[rows_C], teacher_weight_VG, teacher_bias_V)
        if _takes_triton(logits_CV):
            from kernels.fused_triton import divergence_

            caps = (student_softcap, teacher_softcap)
            return divergence_(logits_CV, teacher_CV, scale_C, divergence, temperature, *caps)

        def rule(logits_RV: Tensor, block: slice) -> Tensor:
            teacher_RV = temper_(teacher_CV[block], teacher_softcap, temperature)
            log_p_RV = torch.log_softmax(teacher_RV, -1, out=scratch.like("log_p", teacher_RV)).clamp_(min=LOG_ZERO)
            log_q_RV = torch.log_softmax(logits_RV, -1, out=scratch.like("log_q", logits_RV)).clamp_(min=LOG_ZERO)
            value_RV, slope_RV, q_RV = _closed_form(log_p_RV, log_q_RV, divergence, scratch)
            torch.addcmul(slope_RV, q_RV, slope_RV.sum(-1, keepdim=True), value=-1, out=logits_RV)
            return value_RV.sum(-1)

        return by_blocks(logits_CV, scale_C, student_softcap, temperature, scratch, rule)

    return projected_loss(objective, student_hidden_NH, student_weight_VH, student_bias_V, weights_N, chunk_size)


def fused_topk_divergence(
    student_hidden_NH: Tensor,
    student_weight_VH: Tensor,
    ids_NK: Tensor,
    logprobs_NK: Tensor,
    log_tail_N: Tensor | None,
    weights_N: Tensor,
    divergence: Divergence,
    *,
    importance_NK: Tensor | None = None,
    student_bias_V: Tensor | None = None,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(Σ weights · D, D of each position without gradient) from a stored teacher (`kernels/codec.py`), in nats.

    With `log_tail_N` D is `divergence.topk_divergence_N`, one bucket for the rest of the vocabulary; with
    `importance_NK` in its stead it is the unbiased `divergence.sampled_divergence_N`. Padding is as described there.
    Raises ValueError where shapes disagree or not exactly one of the two is given.
    """
    if (log_tail_N is None) == (importance_NK is None):
        raise ValueError("give log_tail_N for a teacher stored as top tokens, or importance_NK for a sampled one")
    same_length(student_hidden_NH, ids_NK=ids_NK, logprobs_NK=logprobs_NK)
    scratch = Scratch()

    def objective(logits_CV: Tensor, rows_C: Tensor, scale_C: Tensor) -> Tensor:
        kept_CK = logprobs_NK[rows_C] > -math.inf
        ids_CK = ids_NK[rows_C].masked_fill(~kept_CK, 0)
        log_p_CK = logprobs_NK[rows_C].to(logits_CV.dtype).clamp(min=LOG_ZERO)

        def rule(logits_RV: Tensor, block: slice) -> Tensor:
            rows, slots = kept_CK[block].nonzero(as_tuple=True)
            ids = ids_CK[block][rows, slots]
            log_q_RV = torch.log_softmax(logits_RV, -1, out=scratch.like("log_q", logits_RV))
            log_q_RK = log_q_RV.gather(-1, ids_CK[block]).masked_fill(~kept_CK[block], LOG_ZERO).clamp_(min=LOG_ZERO)
            rest_RV = torch.exp(log_q_RV, out=logits_RV)
            value_RK, slope_RK, q_RK = _closed_form(log_p_CK[block], log_q_RK, divergence, Scratch())
            if importance_NK is not None:
                share_RK, impossible = importance_NK[rows_C[block]].to(logits_RV.dtype), divergence.impossible
                value_R = impossible + (share_RK * (value_RK - impossible * q_RK)).sum(-1)
                slope_RK = share_RK * (slope_RK - impossible * q_RK)
                total_R1 = slope_RK.sum(-1, keepdim=True)
                rest_RV.mul_(-total_R1)
            else:
                assert log_tail_N is not None
                # Summed over the rest rather than as 1 − Σ, which loses every digit of a small tail.
                rest_RV[rows, ids] = 0.0
                tail_R1 = rest_RV.sum(-1, keepdim=True).clamp_(min=torch.finfo(rest_RV.dtype).tiny)
                log_p_R1 = log_tail_N[rows_C[block], None].to(logits_RV.dtype).clamp(min=LOG_ZERO)
                tail_value_R1, tail_slope_R1, _ = _closed_form(log_p_R1, tail_R1.log(), divergence, Scratch())
                value_R = value_RK.sum(-1) + tail_value_R1[:, 0]
                total_R1 = slope_RK.sum(-1, keepdim=True) + tail_slope_R1
                # A token of the tail moves its bucket by its share of it.
                rest_RV.mul_(tail_slope_R1 / tail_R1 - total_R1)
            rest_RV[rows, ids] = (slope_RK - q_RK * total_R1)[rows, slots]
            return value_R

        return by_blocks(logits_CV, scale_C, student_softcap, temperature, scratch, rule)

    return projected_loss(objective, student_hidden_NH, student_weight_VH, student_bias_V, weights_N, chunk_size)


def fused_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(Σ weights · −log q(target), −log q(target) of each position without gradient), in nats.

    Weights may be negative (policy gradients); a target whose weight is 0 is never looked at. Raises ValueError where
    shapes disagree.
    """
    same_length(hidden_NH, targets_N=targets_N)
    scratch = Scratch()

    def objective(logits_CV: Tensor, rows_C: Tensor, scale_C: Tensor) -> Tensor:
        targets_C1 = targets_N[rows_C, None]

        def rule(logits_RV: Tensor, block: slice) -> Tensor:
            log_q_RV = torch.log_softmax(logits_RV, -1, out=scratch.like("log_q", logits_RV))
            torch.exp(log_q_RV, out=logits_RV)
            logits_RV.scatter_add_(-1, targets_C1[block], -torch.ones_like(logits_RV[:, :1]))
            return -log_q_RV.gather(-1, targets_C1[block])[:, 0]

        return by_blocks(logits_CV, scale_C, softcap, 1.0, scratch, rule)

    return projected_loss(objective, hidden_NH, weight_VH, bias_V, weights_N, chunk_size)


def _takes_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda and importlib.util.find_spec("triton") is not None


def _closed_form(
    log_p: Tensor, log_q: Tensor, divergence: Divergence, scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor]:
    """The summands of D, u of each token, and q. All three live in `scratch` until its next use."""
    p, q = torch.exp(log_p, out=scratch.like("p", log_p)), torch.exp(log_q, out=scratch.like("q", log_q))
    mixture, work = scratch.like("mixture", p), scratch.like("work", p)
    value, slope = scratch.like("value", p).zero_(), scratch.like("u", p).zero_()
    # Terms with the same B share its logarithm, and their pq/B parts cancel in a Jensen-Shannon divergence.
    for share in dict.fromkeys(term.teacher_share for term in divergence.terms):
        on_p, on_q = (
            sum(term.weight for term in divergence.terms if (term.first, term.teacher_share) == (first, share))
            for first in "pq"
        )
        if 0.0 < share < 1.0:
            torch.mul(p, share, out=mixture).add_(q, alpha=1.0 - share).clamp_(min=torch.finfo(p.dtype).tiny)
            overlap = on_q * share - on_p * (1.0 - share)
            if overlap:
                slope.add_(torch.mul(p, q, out=work).div_(mixture), alpha=overlap)
            log_b = mixture.log_()
        else:
            log_b = log_p if share else log_q
            slope.add_(q if share else p, alpha=on_q if share else -on_p)
        if on_p:
            value.add_(torch.sub(log_p, log_b, out=work).mul_(p), alpha=on_p)
        if on_q:
            torch.sub(log_q, log_b, out=work).mul_(q)
            value.add_(work, alpha=on_q)
            slope.add_(work, alpha=on_q)
    if divergence.variation:
        torch.sub(q, p, out=work)
        slope.add_(torch.sign(work, out=mixture).mul_(q), alpha=0.5 * divergence.variation)
        value.add_(work.abs_(), alpha=0.5 * divergence.variation)
    return value, slope, q

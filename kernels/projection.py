"""The chunked output projection under every fused loss: hidden states in, loss and gradients out.

The logits of a chunk of positions are made, turned into the loss and, in place, into its gradient, and multiplied back
into the gradients of hidden states, weight and bias in the same visit. So the forward pass does all the work and the
backward pass only scales; nothing of size tokens × vocabulary is held. `kernels/fused.py` says what happens to a chunk.

Shape legend: N positions, M of them with a weight, C positions of a chunk, R of a block (what fits a cache),
V vocabulary, H width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 64 << 20  # the logits of a chunk, at least: small matrices multiply slowly
# A chunk reads the weight and adds to its gradient once, so a large weight asks for large chunks. Two of them (student,
# teacher) are half as large as that gradient, which is held anyway.
CHUNK_OF_WEIGHT = 1 / 4
CPU_BLOCK_BYTES, GPU_BLOCK_BYTES = 1 << 20, 64 << 20  # one temporary of a block: to fit a cache, to launch little
SLICE_ROWS = 8192  # rows of a half-precision weight that are widened at once

# Turns the logits of a block into their gradient, in place, and returns the loss of each position.
Rule = Callable[[Tensor, slice], Tensor]
# The same for a chunk: its raw logits (before cap and temperature), which positions they are, and their weights.
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]


class Scratch:
    """Buffers by name, made once and reused: fresh ones cost more in page faults than the arithmetic done in them."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def like(self, name: str, example: Tensor) -> Tensor:
        """An uninitialised tensor of the shape and type of `example`, whose rows may only shrink from call to call."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty_like(example)
        return self._buffers[name][: len(example)]


def projected_loss(
    objective: Objective,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    weights_N: Tensor,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """(Σ weights · loss, loss of each position without gradient) of `objective` on the logits hidden · weightᵀ + bias.

    Positions of weight 0 are dropped and report 0. By default a chunk's logits take `CHUNK_BYTES`, or `CHUNK_OF_WEIGHT`
    of the weight's size where that is more.
    Raises ValueError where shapes disagree or `chunk_size` is below 1.
    """
    if hidden_NH.shape[-1] != weight_VH.shape[-1]:
        raise ValueError(f"hidden states of width {hidden_NH.shape[-1]}, weight of {weight_VH.shape[-1]}: pass a pair")
    same_length(hidden_NH, weights_N=weights_N)
    if chunk_size is None:
        position_bytes = len(weight_VH) * math_dtype(hidden_NH).itemsize
        chunk_size = max(1, CHUNK_BYTES // position_bytes, int(CHUNK_OF_WEIGHT * weight_VH.shape[1]))
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: choose at least 1, or leave it out")
    learns = torch.is_grad_enabled()
    return _ProjectedLoss.apply(hidden_NH, weight_VH, bias_V, weights_N, objective, chunk_size, learns)


class _ProjectedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        weights_N: Tensor,
        objective: Objective,
        chunk_size: int,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = math_dtype(hidden_NH)
        # Gradients stay in the arithmetic's type until the backward pass has scaled them.
        grad_hidden_NH, grad_weight_VH, grad_bias_V = (
            torch.zeros_like(tensor, dtype=dtype) if learns and wanted and tensor is not None else None
            for tensor, wanted in zip((hidden_NH, weight_VH, bias_V), ctx.needs_input_grad, strict=False)
        )
        scale_N = weights_N.to(dtype)
        losses_N = torch.zeros_like(scale_N)
        rows_M = scale_N.nonzero()[:, 0]
        chunk_CV = hidden_NH.new_empty(min(chunk_size, len(rows_M)), len(weight_VH), dtype=dtype)
        # The precision of every product is chosen here, whatever autocast says.
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for start in range(0, len(rows_M), chunk_size):
                rows_C = rows_M[start : start + chunk_size]
                hidden_CH, logits_CV = hidden_NH[rows_C], chunk_CV[: len(rows_C)]
                project_(logits_CV, hidden_CH, weight_VH, bias_V)
                losses_N[rows_C] = objective(logits_CV, rows_C, scale_N[rows_C])
                gradient_CV = logits_CV  # the objective has replaced one by the other
                if grad_hidden_NH is not None:
                    grad_hidden_NH[rows_C] = _back_to_hidden(gradient_CV, weight_VH)
                if grad_weight_VH is not None:
                    _add_outer_(grad_weight_VH, gradient_CV, hidden_CH)
                if grad_bias_V is not None:
                    grad_bias_V += gradient_CV.sum(0)
        ctx.save_for_backward(grad_hidden_NH, grad_weight_VH, grad_bias_V)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden_NH, weight_VH, bias_V)]
        ctx.mark_non_differentiable(losses_N)
        return torch.dot(scale_N, losses_N), losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        unscaled = grad_loss == 1
        gradients = []
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            if gradient is not None and not unscaled:
                # In place, as a copy would double the peak. A second pass over a retained graph is then refused by
                # autograd itself, which notices that what was saved has changed.
                gradient.mul_(grad_loss)
            gradients.append(None if gradient is None else gradient.to(dtype))
        return *gradients, None, None, None, None


def project_(logits_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> None:
    """Writes hidden · weightᵀ + bias into `logits_CV`, accumulated in its type."""
    if weight_VH.dtype == logits_CV.dtype:
        torch.mm(hidden_CH.to(logits_CV.dtype), weight_VH.T, out=logits_CV)
    else:
        for part in _slices(weight_VH):
            logits_CV[:, part] = _product(hidden_CH, weight_VH[part].T, logits_CV.dtype)
    if bias_V is not None:
        logits_CV += bias_V


def by_blocks(
    logits_CV: Tensor, scale_C: Tensor, softcap: float | None, temperature: float, scratch: Scratch, rule: Rule
) -> Tensor:
    """Applies `rule` to raw logits by blocks, with cap and temperature before it and their derivatives after it."""
    block_bytes = CPU_BLOCK_BYTES if logits_CV.device.type == "cpu" else GPU_BLOCK_BYTES
    step = max(1, block_bytes // (logits_CV.shape[1] * logits_CV.itemsize))
    losses_C = torch.empty_like(scale_C)
    for start in range(0, len(logits_CV), step):
        block = slice(start, start + step)
        logits_RV = logits_CV[block]
        temper_(logits_RV, softcap, temperature)
        slope_RV = None
        if softcap is not None:
            slope_RV = torch.mul(logits_RV, temperature / softcap, out=scratch.like("slope", logits_RV))
            slope_RV.square_().neg_().add_(1.0)
        losses_C[block] = rule(logits_RV, block)
        logits_RV.mul_(scale_C[block, None] / temperature)
        if slope_RV is not None:
            logits_RV.mul_(slope_RV)
    return losses_C


def temper_(logits_RV: Tensor, softcap: float | None, temperature: float) -> Tensor:
    """Raw logits to softcap·tanh(z / softcap) / temperature, in place."""
    if softcap is not None:
        logits_RV.div_(softcap).tanh_().mul_(softcap)
    return logits_RV if temperature == 1.0 else logits_RV.div_(temperature)


def same_length(hidden_NH: Tensor, **others: Tensor) -> None:
    """Raises ValueError naming the tensor that does not have one row per position."""
    for name, tensor in others.items():
        if len(tensor) != len(hidden_NH):
            raise ValueError(f"{name} has {len(tensor)} rows for {len(hidden_NH)} positions: select the same positions")


def math_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _back_to_hidden(gradient_CV: Tensor, weight_VH: Tensor) -> Tensor:
    if weight_VH.dtype == gradient_CV.dtype:
        return gradient_CV @ weight_VH
    back_CH = gradient_CV.new_zeros(len(gradient_CV), weight_VH.shape[1])
    for part in _slices(weight_VH):
        back_CH += _product(gradient_CV[:, part], weight_VH[part], gradient_CV.dtype)
    return back_CH


def _add_outer_(total_VH: Tensor, gradient_CV: Tensor, hidden_CH: Tensor) -> None:
    if hidden_CH.dtype == gradient_CV.dtype:
        total_VH.addmm_(gradient_CV.T, hidden_CH)
        return
    for part in _slices(total_VH):
        total_VH[part] += _product(gradient_CV[:, part].T, hidden_CH, total_VH.dtype)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left · right in `dtype`: on a GPU the inputs keep the narrow type of `right` and the sums are wide."""
    if right.is_cuda and right.dtype != dtype:
        return torch.mm(left.to(right.dtype), right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _slices(weight_VH: Tensor) -> list[slice]:
    return [slice(start, start + SLICE_ROWS) for start in range(0, len(weight_VH), SLICE_ROWS)]

"""Compressed teacher distributions: one self-describing value of a Parquet column per sequence, decoded into tensors.

A position keeps some tokens (ids, quantised log-probabilities) and the mass of all others, its tail. Two modes:

- top: the likeliest tokens, until a mass is reached, a probability is too low, or a limit is met. What the tail hides
  biases every divergence downwards. For `divergence.topk_divergence_N`.
- sampled: every token of probability `grain` or more for certain, and of the rest one weighted draw for each `grain` of
  mass, spread evenly over it (systematic sampling). A token is expected in proportion to its probability, so estimates
  are unbiased but for the rounding of log-probabilities. For `divergence.sampled_divergence_N`, and for every
  divergence but KL(q ‖ p), where top mode is the steadier one.

`kernels/planes.py` has the bytes, which are near incompressible: write the column without dictionary and statistics.
`fused.fused_topk_divergence` trains from what `decode` returns. Distributions are stored at the teacher's temperature 1
or whatever the caller encoded.

Shape legend: N positions, V vocabulary, K tokens of a position, T tokens of all positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.planes import DEEPEST, SAMPLED, TOP, Sequence, pack, unpack


@dataclass(frozen=True)
class TeacherRows:
    """Decoded positions of all sequences in order, padded to the longest: a padded slot has log-probability −inf, id 0.

    `importance_NK` is there in sampled mode only: 1 for certain tokens, times drawn / times expected for drawn ones, 0
    for padding. `lengths` counts the positions of each sequence.
    """

    vocabulary: int
    ids_NK: Tensor
    logprobs_NK: Tensor
    log_tail_N: Tensor
    importance_NK: Tensor | None
    lengths: list[int]


def encode_top(
    logprobs_NV: Tensor, *, mass: float = 0.99, limit: int = 100, min_prob: float = 1e-3, resolution: int = 16
) -> bytes:
    """One sequence in top mode, from log-probabilities (nats) of the whole vocabulary. Settings as in `encode_topk`.

    Raises ValueError for logits in place of log-probabilities and for settings out of range.
    """
    _check_normalised(logprobs_NV)
    vocabulary = logprobs_NV.shape[1]
    logprobs_NK, ids_NK = logprobs_NV.topk(min(limit, vocabulary))
    return encode_topk(
        ids_NK, logprobs_NK, vocabulary, mass=mass, limit=limit, min_prob=min_prob, resolution=resolution
    )


def encode_topk(
    ids_NK: Tensor,
    logprobs_NK: Tensor,
    vocabulary: int,
    *,
    mass: float = 0.99,
    limit: int = 100,
    min_prob: float = 1e-3,
    resolution: int = 16,
) -> bytes:
    """One sequence in top mode, from the best tokens an engine returned, in any order, −inf where it returned fewer.

    A position keeps its likeliest token, and further ones while those before hold less than `mass`, they have at least
    `min_prob`, and they number at most `limit` (1 to 255). `resolution` is 1 to 55.
    Raises ValueError for settings out of range and for ids outside the vocabulary.
    """
    if not 1 <= limit <= 255:
        raise ValueError(f"limit is {limit}: a position stores 1 to 255 tokens")
    logprobs_NK, order_NK = logprobs_NK.double().cpu().sort(dim=-1, descending=True)
    p_NK = logprobs_NK.exp()
    kept_NK = (p_NK.cumsum(-1) - p_NK < mass) & (p_NK >= min_prob)
    kept_NK[:, 0], kept_NK[:, limit:] = True, False
    ids_T, logprobs_T = ids_NK.cpu().gather(-1, order_NK)[kept_NK], logprobs_NK[kept_NK]
    if ((ids_T < 0) | (ids_T >= vocabulary)).any():
        raise ValueError(f"an id is outside the vocabulary of {vocabulary}: pass the width of the teacher's projection")
    keys_T = kept_NK.nonzero()[:, 0] * vocabulary + ids_T
    tail_N = 1.0 - (p_NK * kept_NK).sum(-1)
    return _pack(TOP, vocabulary, resolution, keys_T, logprobs_T, torch.zeros_like(keys_T), tail_N)


def encode_sampled(
    logprobs_NV: Tensor, generator: torch.Generator, *, grain: float = 1 / 64, resolution: int = 48
) -> bytes:
    """One sequence in sampled mode, from log-probabilities (nats) of the whole vocabulary.

    A position stores about Σ_v min(1, p_v / grain) tokens, never more than 1 / grain + 1. `generator` is on the CPU;
    seeded from the row's id, a redone row has identical bytes.
    Raises ValueError for logits in place of log-probabilities and for settings out of range.
    """
    if not 1 / 250 <= grain <= 1.0:
        raise ValueError(f"grain is {grain}: choose it from 0.004 to 1, as a position stores at most 255 tokens")
    _check_normalised(logprobs_NV)
    positions, vocabulary = logprobs_NV.shape
    logprobs_NV = logprobs_NV.double().cpu()
    p_NV = logprobs_NV.exp()
    certain_NV = p_NV >= grain
    # Points spread evenly over the cumulative mass of the rest fall on a token in proportion to its probability.
    cumulative_NV = p_NV.masked_fill(certain_NV, 0.0).cumsum(-1)
    tail_N1 = cumulative_NV[:, -1:].clone()
    draws_N1 = (tail_N1 / grain).ceil()
    steps_D = torch.arange(int(draws_N1.max())) if positions else torch.arange(0)
    starts_N1 = torch.rand(positions, 1, dtype=torch.float64, generator=generator)
    drawn_ND = torch.searchsorted(cumulative_NV, (steps_D + starts_N1) / draws_N1 * tail_N1, right=True)
    # Rounding may put the last point on the total itself, which belongs to the last token that has any mass.
    drawn_ND = drawn_ND.minimum(torch.searchsorted(cumulative_NV, tail_N1))
    drawn_ND += torch.arange(positions)[:, None] * vocabulary
    drawn_T, times_T = drawn_ND[steps_D < draws_N1].unique(return_counts=True)
    certain_T = certain_NV.flatten().nonzero()[:, 0]
    keys_T = torch.cat([certain_T, drawn_T])
    times_T = torch.cat([torch.zeros_like(certain_T), times_T])
    return _pack(SAMPLED, vocabulary, resolution, keys_T, logprobs_NV.flatten()[keys_T], times_T, tail_N1[:, 0])


def to_column(sequences: Iterable[bytes]) -> pa.Array:
    """A Parquet column of encoded sequences, one binary value each."""
    return pa.array(list(sequences), type=pa.binary())


def decode(sequences: Iterable[bytes] | pa.Array | pa.ChunkedArray) -> TeacherRows:
    """The positions of all sequences, in float32.

    Log-probabilities of certain tokens are scaled so that they and the tail sum to 1.
    Raises ValueError for bytes that are no encoded sequence, of another version or damaged, for no sequence at all, and
    for sequences of several modes or vocabularies.
    """
    values = sequences.to_pylist() if isinstance(sequences, pa.Array | pa.ChunkedArray) else sequences
    parts = [unpack(value) for value in values]
    kinds = {(part.mode, part.vocabulary) for part in parts}
    if len(kinds) != 1:
        raise ValueError(f"{len(kinds)} kinds of sequences (mode, vocabulary) in one batch: decode each kind by itself")
    ((mode, vocabulary),) = kinds
    counts_N = np.concatenate([part.counts_N for part in parts])
    starts_N = counts_N.cumsum() - counts_N
    rows_T = np.repeat(np.arange(len(counts_N)), counts_N)
    slots_T = np.arange(len(rows_T)) - starts_N[rows_T]

    def padded(values_T: NDArray[np.generic], padding: float, dtype: torch.dtype) -> Tensor:
        slots_NK = torch.full((len(counts_N), int(counts_N.max(initial=0))), padding, dtype=dtype)
        slots_NK[rows_T, slots_T] = torch.from_numpy(values_T).to(dtype)
        return slots_NK

    scaled = [_scaled(part) for part in parts]
    importance_T = np.concatenate([importance_T for _, importance_T in scaled])
    return TeacherRows(
        vocabulary,
        padded(np.concatenate([part.ids_T for part in parts]), 0, torch.int64),
        padded(np.concatenate([logprobs_T for logprobs_T, _ in scaled]), -math.inf, torch.float32),
        torch.from_numpy(np.concatenate([part.log_tail_N for part in parts])).float(),
        padded(importance_T, 0.0, torch.float32) if mode == SAMPLED else None,
        [len(part.counts_N) for part in parts],
    )


def _scaled(part: Sequence) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log-probabilities after scaling, and the importance of each token."""
    positions = len(part.counts_N)
    rows_T, certain_T = np.repeat(np.arange(positions), part.counts_N), part.times_T == 0
    tail_N, p_T = np.exp(part.log_tail_N), np.exp(part.logprobs_T)
    certain_N = np.bincount(rows_T, p_T * certain_T, minlength=positions)
    # Where the tail rounds to 1, or nothing is certain, there is nothing to scale.
    scales_N = (tail_N < 1.0) & (certain_N > 0.0)
    shift_N = np.log(np.divide(1.0 - tail_N, certain_N, out=np.ones(positions), where=scales_N))
    drawn_N = np.bincount(rows_T, part.times_T, minlength=positions)
    expected_T = drawn_N[rows_T] * p_T / tail_N[rows_T]
    importance_T = np.divide(part.times_T, expected_T, out=np.ones(len(p_T)), where=~certain_T)
    return part.logprobs_T + shift_N[rows_T] * certain_T, importance_T


def _pack(
    mode: int, vocabulary: int, resolution: int, keys_T: Tensor, logprobs_T: Tensor, times_T: Tensor, tail_N: Tensor
) -> bytes:
    """Tokens in any order, each a key: position · vocabulary + id."""
    keys_T, order_T = keys_T.sort()
    return pack(
        Sequence(
            mode,
            resolution,
            vocabulary,
            (keys_T // vocabulary).bincount(minlength=len(tail_N)).numpy(),
            tail_N.clamp(min=math.exp(-DEEPEST), max=1.0).log().numpy(),
            (keys_T % vocabulary).numpy(),
            logprobs_T[order_T].numpy(),
            times_T[order_T].numpy(),
        )
    )


def _check_normalised(logprobs_NV: Tensor) -> None:
    if len(logprobs_NV) and logprobs_NV.logsumexp(-1).abs().max() > 1e-2:
        raise ValueError("these are no log-probabilities (they do not sum to 1): pass logits.log_softmax(-1)")

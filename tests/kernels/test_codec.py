"""Compressed teacher distributions: round trips, the promise of each mode, and refusals."""

import io
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import planes
from kernels.codec import decode, encode_sampled, encode_top, encode_topk, to_column
from kernels.divergence import divergence_N, forward_kl, jsd, sampled_divergence_N, topk_divergence_N
from kernels.fused import fused_topk_divergence

torch.set_num_threads(1)


def logprobs(positions: int, vocabulary: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(positions, vocabulary, generator=generator) * spread).log_softmax(-1)


@given(
    positions=st.integers(0, 6),
    vocabulary=st.sampled_from([2, 7, 256, 257, 65_536, 65_537, 200_000]),
    resolution=st.integers(1, planes.FINEST),
    mode=st.sampled_from([planes.TOP, planes.SAMPLED]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_planes_round_trip_within_the_stated_error(
    positions: int, vocabulary: int, resolution: int, mode: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    counts_N = random.integers(0, min(vocabulary, 255) + 1, positions)
    ids = [np.sort(random.choice(vocabulary, count, replace=False)) for count in counts_N]
    tokens = int(counts_N.sum())
    times_T = random.integers(0, 256, tokens) if mode == planes.SAMPLED else np.zeros(tokens, np.int64)
    sequence = planes.Sequence(
        mode=mode,
        resolution=resolution,
        vocabulary=vocabulary,
        counts_N=counts_N,
        log_tail_N=-random.uniform(0, planes.DEEPEST, positions),
        ids_T=np.concatenate([np.zeros(0, np.int64), *ids]),
        logprobs_T=-random.uniform(0, planes.DEEPEST, tokens),
        times_T=times_T,
    )
    back = planes.unpack(planes.pack(sequence))
    assert (back.mode, back.resolution, back.vocabulary) == (mode, resolution, vocabulary)
    for name in ("counts_N", "ids_T", "times_T"):
        np.testing.assert_array_equal(getattr(back, name), getattr(sequence, name))
    for name, step in (("log_tail_N", planes.FINEST), ("logprobs_T", resolution)):
        want, got = getattr(sequence, name), getattr(back, name)
        bound = (np.abs(want) + planes.KNEE) * np.expm1(0.5 / step)
        assert (np.abs(got - want) <= bound + 1e-9).all()


def test_top_mode_keeps_the_likeliest_until_the_first_limit() -> None:
    p_NV = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]])
    rows = decode([encode_top(p_NV.log(), mass=0.9, limit=3, min_prob=0.02)])
    assert rows.logprobs_NK.isfinite().sum(-1).tolist() == [3, 1, 3]
    assert rows.ids_NK[0].tolist() == [0, 1, 2]
    assert rows.ids_NK[1].tolist() == [0, 0, 0]
    assert (rows.vocabulary, rows.lengths, rows.importance_NK) == (4, [3], None)
    torch.testing.assert_close(rows.logprobs_NK.exp().sum(-1) + rows.log_tail_N.exp(), torch.ones(3))
    torch.testing.assert_close(rows.log_tail_N.exp(), torch.tensor([0.05, 0.03, 0.25]), rtol=0.04, atol=0)
    by_min_prob = decode([encode_top(p_NV.log(), mass=1.0, min_prob=0.1)])
    assert by_min_prob.logprobs_NK.isfinite().sum(-1).tolist() == [3, 1, 4]


def test_an_engines_best_tokens_in_any_order_are_the_same_bytes() -> None:
    full_NV = logprobs(5, 50)
    best_NK, ids_NK = full_NV.topk(20)
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert encode_topk(ids_NK[:, shuffled], best_NK[:, shuffled], 50, limit=20) == encode_top(full_NV, limit=20)
    best_NK[:, 3:] = -math.inf
    assert decode([encode_topk(ids_NK, best_NK, 50)]).ids_NK.shape[1] <= 3


@given(seed=st.integers(0, 1000), vocabulary=st.integers(2, 300), resolution=st.sampled_from([8, 16, 55]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_top_mode_of_everything_is_the_full_divergence_up_to_rounding(
    seed: int, vocabulary: int, resolution: int
) -> None:
    full_NV, student_NV = logprobs(3, vocabulary, seed), logprobs(3, vocabulary, seed + 1)
    rows = decode([encode_top(full_NV, mass=1.1, limit=255, min_prob=0.0, resolution=resolution)])
    got_N = topk_divergence_N(rows.ids_NK, rows.logprobs_NK, rows.log_tail_N, student_NV, jsd())
    want_N = divergence_N(full_NV, student_NV, jsd())
    # A log-probability off by ε moves a Jensen-Shannon divergence by less than ε on average.
    assert ((got_N - want_N).abs() < 1.5 / resolution).all()


def test_the_loss_of_a_truncated_teacher_is_low_but_close() -> None:
    full_NV = logprobs(200, 2000, 1)
    student_NV = (full_NV + logprobs(200, 2000, 2, 0.7)).log_softmax(-1)
    want = divergence_N(full_NV, student_NV, forward_kl()).mean()
    rows = decode([encode_top(full_NV)])
    got = topk_divergence_N(rows.ids_NK, rows.logprobs_NK, rows.log_tail_N, student_NV, forward_kl()).mean()
    assert 0.75 * want < got < want


@given(seed=st.integers(0, 1000), vocabulary=st.integers(1, 60), grain=st.sampled_from([1.0, 0.2, 1 / 64, 1 / 250]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_sampled_mode_keeps_likely_tokens_and_spreads_the_draws(seed: int, vocabulary: int, grain: float) -> None:
    full_NV = logprobs(4, vocabulary, seed)
    sequence = planes.unpack(encode_sampled(full_NV, torch.Generator().manual_seed(seed), grain=grain, resolution=55))
    assert (sequence.counts_N <= 1 / grain + 1).all()
    rows_T = np.repeat(np.arange(4), sequence.counts_N)
    p_T = full_NV.double().exp()[rows_T, sequence.ids_T].numpy()
    np.testing.assert_array_equal(sequence.times_T == 0, p_T >= grain)
    assert (sequence.times_T == 0).sum() == (full_NV.double().exp() >= grain).sum()
    # Systematic sampling: a token is drawn its expected number of times, rounded up or down.
    tail_N = (full_NV.double().exp() * (full_NV.double().exp() < grain)).sum(-1).numpy()
    draws_N = np.bincount(rows_T, sequence.times_T, minlength=4)
    np.testing.assert_array_equal(draws_N, np.ceil(tail_N / grain))
    expected_T = (draws_N / np.maximum(tail_N, 1e-300))[rows_T] * p_T
    assert (np.abs(sequence.times_T - expected_T)[sequence.times_T > 0] < 1 + 1e-6).all()


def test_sampled_mode_is_unbiased() -> None:
    # The same position 4,000 times: the means of loss and gradient must be the exact ones, within the noise of the
    # draws and what rounding moves a probability by (under 3 % at this resolution).
    full_V = logprobs(1, 40, 5, 1.5)
    student_NV = logprobs(1, 40, 6, 1.5).double().expand(4000, 40).clone().requires_grad_()
    blob = encode_sampled(full_V.expand(4000, 40), torch.Generator().manual_seed(0), grain=0.1, resolution=55)
    rows = decode([blob])
    assert rows.importance_NK is not None
    args = (rows.ids_NK, rows.logprobs_NK, rows.importance_NK, student_NV, forward_kl())
    got_N = sampled_divergence_N(*args)
    exact_NV = student_NV[:1].detach().clone().requires_grad_()
    want_N = divergence_N(full_V.double(), exact_NV, forward_kl())
    assert got_N.std() > 0.02  # the draws do differ
    assert abs(got_N.mean().item() - want_N.item()) < 4 * got_N.std().item() / math.sqrt(4000) + 2e-3
    (got_NV,) = torch.autograd.grad(got_N.sum(), student_NV)
    (want_NV,) = torch.autograd.grad(want_N.sum(), exact_NV)
    noise_V = got_NV.std(0) / math.sqrt(4000)
    assert ((got_NV.mean(0) - want_NV[0]).abs() < 4.5 * noise_V + 0.03 * full_V[0].exp()).all()


def test_what_truncation_loses_sampling_keeps() -> None:
    full_NV = logprobs(300, 2000, 1)
    student_NV = (full_NV + logprobs(300, 2000, 2, 0.7)).log_softmax(-1)
    want = divergence_N(full_NV, student_NV, forward_kl()).mean()
    sampled = encode_sampled(full_NV, torch.Generator().manual_seed(3))
    top, rows = decode([encode_top(full_NV, limit=16)]), decode([sampled])
    assert rows.importance_NK is not None
    got = sampled_divergence_N(rows.ids_NK, rows.logprobs_NK, rows.importance_NK, student_NV, forward_kl()).mean()
    low = topk_divergence_N(top.ids_NK, top.logprobs_NK, top.log_tail_N, student_NV, forward_kl()).mean()
    assert abs(got - want) < 0.05 * want < want - low


@pytest.mark.parametrize("sampled", [False, True])
def test_from_parquet_to_the_fused_loss(sampled: bool) -> None:
    parts = [logprobs(length, 70, seed) for seed, length in enumerate((4, 0, 7, 1))]
    generator = torch.Generator().manual_seed(0)
    blobs = [encode_sampled(part, generator) if sampled else encode_top(part) for part in parts]
    file = io.BytesIO()
    pq.write_table(pa.table({"teacher": to_column(blobs)}), file, compression="zstd")
    rows = decode(pq.read_table(file)["teacher"])
    assert rows.lengths == [4, 0, 7, 1]
    assert rows.ids_NK.dtype == torch.int64
    assert rows.logprobs_NK.dtype == rows.log_tail_N.dtype == torch.float32
    hidden_NH = logprobs(12, 5, 8).requires_grad_()
    weight_VH = logprobs(70, 5, 9).requires_grad_()
    loss, loss_N = fused_topk_divergence(
        hidden_NH,
        weight_VH,
        rows.ids_NK,
        rows.logprobs_NK,
        None if sampled else rows.log_tail_N,
        torch.ones(12),
        forward_kl(),
        importance_NK=rows.importance_NK,
    )
    loss.backward()
    want_N = divergence_N(torch.cat(parts), hidden_NH @ weight_VH.T, forward_kl())
    torch.testing.assert_close(loss_N, want_N.detach(), rtol=0.2, atol=0.2)
    assert hidden_NH.grad is not None
    assert hidden_NH.grad.isfinite().all()


def test_a_row_redone_from_its_seed_is_the_same_bytes() -> None:
    full_NV = logprobs(3, 500, 1, 0.5)
    first, again, other = (encode_sampled(full_NV, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert first == again != other


def test_positions_are_small() -> None:
    # Like a language model's: a few likely tokens on a long tail.
    ranks_V = torch.arange(1, 49_153)
    shuffle = torch.Generator().manual_seed(0)
    zipf_NV = torch.stack([-1.6 * ranks_V.log()[torch.randperm(49_152, generator=shuffle)] for _ in range(60)])
    for blob in (encode_top(zipf_NV.log_softmax(-1)), encode_sampled(zipf_NV.log_softmax(-1), shuffle)):
        assert len(blob) / 60 < 100


def test_strange_bytes_are_refused_with_the_fix() -> None:
    blob = encode_top(logprobs(3, 50))
    with pytest.raises(ValueError, match=r"version 2, this code reads 1: redo the annotation"):
        decode([blob[:4] + b"\x02" + blob[5:]])
    for strange in (b"", b"SWT", b"SWTD", b"parquet?"):
        with pytest.raises(ValueError, match="read the column that"):
            decode([strange])
    for damaged in (blob[:-1], blob + b"\x00", blob[:7], blob[:8]):
        with pytest.raises(ValueError, match="damaged"):
            decode([damaged])
    for place in range(5, len(blob)):
        with pytest.raises(ValueError, match="damaged"):
            decode([blob[:place] + bytes([blob[place] ^ 1]) + blob[place + 1 :]])


def test_mistakes_are_refused_with_the_fix() -> None:
    full_NV = logprobs(3, 50)
    generator = torch.Generator()
    with pytest.raises(ValueError, match="pass logits"):
        encode_top(full_NV + 1.0)
    with pytest.raises(ValueError, match="pass logits"):
        encode_sampled(full_NV - 1.0, generator)
    with pytest.raises(ValueError, match="1 to 255"):
        encode_top(full_NV, limit=256)
    with pytest.raises(ValueError, match="1 to 55"):
        encode_top(full_NV, resolution=56)
    with pytest.raises(ValueError, match=r"from 0\.004 to 1"):
        encode_sampled(full_NV, generator, grain=0.001)
    with pytest.raises(ValueError, match="width of the teacher's projection"):
        encode_topk(torch.tensor([[49, 50]]), torch.tensor([[-0.5, -1.5]]), 50)
    with pytest.raises(ValueError, match="decode each kind by itself"):
        decode([encode_top(full_NV), encode_sampled(full_NV, generator)])
    with pytest.raises(ValueError, match="0 kinds"):
        decode([])

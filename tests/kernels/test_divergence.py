"""The plain divergences: two-token cases worked out by hand, exact limits, the tail bucket, and sampled teachers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.divergence import (
    NAMES,
    Divergence,
    divergence_N,
    forward_kl,
    jsd,
    named,
    reverse_kl,
    sampled_divergence_N,
    skewed_kl,
    skewed_reverse_kl,
    topk_divergence_N,
    total_variation,
)

torch.set_num_threads(1)

EVERY = [
    forward_kl(),
    reverse_kl(),
    skewed_kl(0.1),
    skewed_reverse_kl(0.1),
    skewed_reverse_kl(0.0),
    jsd(0.5),
    jsd(0.1),
    total_variation(),
]
every = pytest.mark.parametrize("divergence", EVERY, ids=repr)


def logits(*shape: int, seed: int = 0, spread: float = 2.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread).to(dtype)


# Teacher p = (3/4, 1/4), student q = (1/2, 1/2). Every figure below is worked out on paper from the definition.
HAND = {
    "KL(p‖q)": (forward_kl(), 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
    "KL(q‖p)": (reverse_kl(), 0.5 * math.log(2 / 3) + 0.5 * math.log(2)),
    # 0.1 p + 0.9 q = (0.525, 0.475)
    "KL(p‖.1p+.9q)": (skewed_kl(0.1), 0.75 * math.log(0.75 / 0.525) + 0.25 * math.log(0.25 / 0.475)),
    # 0.9 p + 0.1 q = (0.725, 0.275)
    "KL(q‖.9p+.1q)": (skewed_reverse_kl(0.1), 0.5 * math.log(0.5 / 0.725) + 0.5 * math.log(0.5 / 0.275)),
    # M = 0.1 p + 0.9 q, and 0.1 weighs the teacher's term
    "JSD(.1)": (
        jsd(0.1),
        0.1 * (0.75 * math.log(0.75 / 0.525) + 0.25 * math.log(0.25 / 0.475))
        + 0.9 * (0.5 * math.log(0.5 / 0.525) + 0.5 * math.log(0.5 / 0.475)),
    ),
    "JSD(0)": (jsd(0.0), 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
    "JSD(1)": (jsd(1.0), 0.5 * math.log(2 / 3) + 0.5 * math.log(2)),
    "TV": (total_variation(), 0.25),
}


@pytest.mark.parametrize("case", HAND)
def test_two_tokens_by_hand(case: str) -> None:
    divergence, expected = HAND[case]
    teacher_NV = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log() + 3.0
    student_NV = torch.zeros(1, 2, dtype=torch.float64)
    assert divergence_N(teacher_NV, student_NV, divergence).item() == pytest.approx(expected, rel=1e-12)


@every
def test_student_equal_to_teacher_is_zero_and_at_rest(divergence: Divergence) -> None:
    student_NV = logits(4, 9).requires_grad_()
    value_N = divergence_N(student_NV.detach() + 1.5, student_NV, divergence)
    assert value_N.abs().max() < 1e-12
    if not divergence.variation:
        value_N.sum().backward()
        assert student_NV.grad is not None
        assert student_NV.grad.abs().max() < 1e-12


@every
def test_gradcheck(divergence: Divergence) -> None:
    teacher_NV = logits(3, 5, seed=1)
    assert torch.autograd.gradcheck(
        lambda student_NV: divergence_N(teacher_NV, student_NV, divergence, temperature=1.7),
        (logits(3, 5, seed=2).requires_grad_(),),
    )


@every
def test_impossible_tokens_give_no_nan(divergence: Divergence) -> None:
    teacher_NV, student_NV = logits(3, 6, seed=1), logits(3, 6, seed=2)
    teacher_NV[:, 4:] = -math.inf
    student_NV[1, 5] = -math.inf
    student_NV[2, 0] = -math.inf
    student_NV.requires_grad_()
    value_N = divergence_N(teacher_NV, student_NV, divergence)
    value_N.sum().backward()
    assert student_NV.grad is not None
    assert value_N.isfinite().all()
    assert student_NV.grad.isfinite().all()


def test_infinite_divergence_pushes_the_student_off_the_impossible_token() -> None:
    student_NV = torch.zeros(1, 3, requires_grad=True)
    value_N = divergence_N(torch.tensor([[0.0, 0.0, -math.inf]]), student_NV, reverse_kl())
    value_N.sum().backward()
    assert student_NV.grad is not None
    assert value_N.item() > 1000
    assert student_NV.grad[0, 2] > 0 > student_NV.grad[0, 0]


@every
@given(seed=st.integers(0, 10_000), vocabulary=st.integers(2, 40), temperature=st.sampled_from([0.5, 1.0, 2.0]))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_half_precision_logits_are_computed_in_float32(
    divergence: Divergence, seed: int, vocabulary: int, temperature: float
) -> None:
    teacher_NV = logits(3, vocabulary, seed=seed, dtype=torch.bfloat16)
    student_NV = logits(3, vocabulary, seed=seed + 1, dtype=torch.bfloat16)
    got_N = divergence_N(teacher_NV, student_NV, divergence, temperature)
    want_N = divergence_N(teacher_NV.double(), student_NV.double(), divergence, temperature)
    assert got_N.dtype == torch.float32
    assert (want_N > -1e-12).all()
    torch.testing.assert_close(got_N.double(), want_N, rtol=1e-5, atol=2e-6)


def top(teacher_NV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    log_p_NK, ids_NK = teacher_NV.log_softmax(-1).topk(k)
    return ids_NK, log_p_NK, (1 - log_p_NK.exp().sum(-1)).clamp(min=0).log()


@every
@given(seed=st.integers(0, 10_000), k=st.integers(1, 11))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_tail_bucket_is_never_above_the_full_vocabulary(divergence: Divergence, seed: int, k: int) -> None:
    teacher_NV, student_NV = logits(4, 12, seed=seed), logits(4, 12, seed=seed + 1)
    bucketed_N = topk_divergence_N(*top(teacher_NV, k), student_NV, divergence)
    assert (bucketed_N <= divergence_N(teacher_NV, student_NV, divergence) + 1e-10).all()
    assert (bucketed_N >= -1e-12).all()


@every
def test_tail_bucket_over_every_token_is_the_full_vocabulary(divergence: Divergence) -> None:
    teacher_NV, student_NV = logits(4, 12, seed=1), logits(4, 12, seed=2)
    ids_NK, log_p_NK, _ = top(teacher_NV, 12)
    nothing_N = torch.full((4,), -math.inf, dtype=torch.float64)
    got_N = topk_divergence_N(ids_NK, log_p_NK, nothing_N, student_NV, divergence)
    torch.testing.assert_close(got_N, divergence_N(teacher_NV, student_NV, divergence))


def test_truncated_mass_is_a_bucket_and_not_zero() -> None:
    # Teacher (1/2, 1/4, 1/4) cut after one token, student (1/4, 1/4, 1/2): KL of the buckets (1/2, 1/2) and (1/4, 3/4).
    student_NV = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log()
    half_NK = torch.tensor([[0.5]], dtype=torch.float64).log()
    got_N = topk_divergence_N(torch.tensor([[0]]), half_NK, half_NK[:, 0], student_NV, forward_kl())
    assert got_N.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-12)


@every
def test_tail_bucket_gradcheck_with_padding(divergence: Divergence) -> None:
    ids_NK, log_p_NK, _ = top(logits(3, 6, seed=1), 4)
    log_p_NK[1, 2:] = -math.inf
    ids_NK[1, 2:] = 0
    log_tail_N = (1 - log_p_NK.exp().sum(-1)).log()
    assert torch.autograd.gradcheck(
        lambda student_NV: topk_divergence_N(ids_NK, log_p_NK, log_tail_N, student_NV, divergence, 1.3),
        (logits(3, 6, seed=2).requires_grad_(),),
    )


@every
def test_sampled_estimate_is_exact_in_expectation(divergence: Divergence) -> None:
    # The first two tokens are certain and one is drawn from the other four: the mean over the four outcomes, each by
    # its probability, must be the divergence and its gradient.
    teacher_NV = logits(1, 6, seed=1)
    log_p_V = teacher_NV.log_softmax(-1)[0].sort(descending=True)
    tail = log_p_V.values[2:].exp().sum()
    exact_NV, mean_NV = (logits(1, 6, seed=2).requires_grad_() for _ in range(2))
    exact_N, mean_N = divergence_N(teacher_NV, exact_NV, divergence), torch.zeros(1, dtype=torch.float64)
    for drawn in range(2, 6):
        slots = torch.tensor([0, 1, drawn])
        chance = log_p_V.values[drawn].exp() / tail
        importance_NK = torch.stack([torch.ones(()), torch.ones(()), 1 / chance])[None]
        args = (log_p_V.indices[slots][None], log_p_V.values[slots][None], importance_NK)
        mean_N = mean_N + chance * sampled_divergence_N(*args, mean_NV, divergence)
    torch.testing.assert_close(mean_N, exact_N)
    (exact_grad_NV,) = torch.autograd.grad(exact_N.sum(), exact_NV)
    (mean_grad_NV,) = torch.autograd.grad(mean_N.sum(), mean_NV)
    torch.testing.assert_close(mean_grad_NV, exact_grad_NV)


@pytest.mark.parametrize("divergence", [d for d in EVERY if d not in (reverse_kl(), skewed_reverse_kl(0.0))], ids=repr)
def test_sampled_estimate_needs_no_draw_of_an_impossible_token(divergence: Divergence) -> None:
    teacher_NV, student_NV = torch.tensor([[0.6, 0.4, 0.0]]).log(), torch.tensor([[0.1, 0.2, 0.7]]).log()
    got_N = sampled_divergence_N(torch.tensor([[0, 1]]), teacher_NV[:, :2], torch.ones(1, 2), student_NV, divergence)
    torch.testing.assert_close(got_N, divergence_N(teacher_NV, student_NV, divergence))


def test_sampled_estimate_stays_bounded_where_the_student_is_far() -> None:
    # A token of probability 1e-6 drawn once stands for a tail of 0.01, that is for 10,000 tokens like it. Where the
    # student is sure of it, plain weighting would report 10,000 times the loss.
    teacher_NK = torch.tensor([[0.99, 1e-6]]).log()
    student_NV = torch.tensor([[1e-3, 0.998, 1e-3]]).log()
    args = (torch.tensor([[0, 1]]), teacher_NK, torch.tensor([[1.0, 1e4]]), student_NV)
    for divergence in (skewed_reverse_kl(0.1), jsd(0.5), total_variation(), skewed_kl(0.1)):
        assert sampled_divergence_N(*args, divergence).abs().item() < 3.0


def test_names_and_coefficients() -> None:
    assert named("jsd", beta=0.3) == jsd(0.3)
    assert named("skewed_reverse_kl", alpha=0.2) == skewed_reverse_kl(0.2)
    assert len({named(name) for name in NAMES}) == len(NAMES)
    with pytest.raises(ValueError, match="use one of forward_kl"):
        named("kl")
    with pytest.raises(ValueError, match="from 0 to 1, below 1"):
        skewed_kl(1.0)
    with pytest.raises(ValueError, match="beta is 2"):
        jsd(2)


def test_different_vocabularies_are_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match="cut both output projections"):
        divergence_N(torch.zeros(1, 5), torch.zeros(1, 6), forward_kl())

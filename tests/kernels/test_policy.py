"""MiniLLM's arithmetic: cases worked by hand, and a plain float64 twin that follows the paper's sums."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.divergence import log_mixture
from kernels.policy import clipped_N, returns_T, rewards_N, whiten_N


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def plain_returns(rewards: list[float], discount: float, own: bool) -> list[float]:
    """Position by position, term by term."""
    found = []
    for t in range(len(rewards)):
        later = rewards[t if own else t + 1 :]
        found.append(sum(discount**k * reward for k, reward in enumerate(later)) / len(later) if later else 0.0)
    return found


def test_rewards_are_scaled_then_cut() -> None:
    log_p_N, log_q_N = f64(-1.0, -4.0, -90.0, 0.0), f64(-2.0, -3.0, -1.0, -80.0)
    assert rewards_N(log_p_N, log_q_N, scale=0.5, limit=100.0).tolist() == [2.0, -2.0, -100.0, 100.0]


def test_returns_worked_by_hand() -> None:
    # 4; 2 + 4/2 = 4; 8 + 4/2 = 10, over 1, 2 and 3 positions.
    assert returns_T(f64(8, 2, 4), discount=0.5).tolist() == pytest.approx([10 / 3, 2.0, 4.0])
    assert returns_T(f64(8, 2, 4), discount=0.5, own=False).tolist() == [2.0, 4.0, 0.0]
    assert returns_T(f64(5), discount=0.95).tolist() == [5.0]
    assert returns_T(f64(5), discount=0.95, own=False).tolist() == [0.0]
    assert returns_T(f64(3, 1), discount=0.0).tolist() == [1.5, 1.0]
    assert returns_T(f64(), discount=0.95).tolist() == []


@given(
    st.lists(st.floats(-100, 100), min_size=1, max_size=70),
    st.floats(0, 1),
    st.booleans(),
)
def test_returns_are_those_of_the_plain_sums(rewards: list[float], discount: float, own: bool) -> None:
    found = returns_T(f64(*rewards), discount=discount, own=own)
    assert found.tolist() == pytest.approx(plain_returns(rewards, discount, own), rel=1e-9, abs=1e-9)


def test_whitening_worked_by_hand() -> None:
    assert whiten_N(f64(1, 3)).tolist() == pytest.approx([-1.0, 1.0])
    # A constant says nothing: no blow-up, no NaN.
    assert whiten_N(f64(7, 7, 7)).tolist() == [0.0, 0.0, 0.0]
    assert whiten_N(f64(7)).tolist() == [0.0]
    assert len(whiten_N(f64())) == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "slope"),
    [
        (1.0, 2.0, -2.0, 2.0),
        (1.1, -3.0, 3.3, -3.3),
        # A good token that is already likelier, and a bad one that is already rarer, are held.
        (1.5, 2.0, -2.4, 0.0),
        (0.5, -2.0, 1.6, 0.0),
        # The other way the clip does not protect.
        (1.5, -2.0, 3.0, -3.0),
        (0.5, 2.0, -1.0, 1.0),
    ],
)
def test_clip_worked_by_hand(ratio: float, advantage: float, objective: float, slope: float) -> None:
    log_b_N = f64(-1.7)
    found = clipped_N(log_b_N + math.log(ratio), log_b_N, f64(advantage), 0.2)
    assert [part.item() for part in found] == pytest.approx([objective, slope])


def test_slope_is_the_objectives_gradient_through_the_vocabulary() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NV, before_NV = torch.randn(2, 40, 9, generator=generator, dtype=torch.float64)
    tokens_N1 = torch.randint(9, (40, 1), generator=generator)
    advantages_N = torch.randn(40, generator=generator, dtype=torch.float64)
    log_b_N = before_NV.log_softmax(-1).gather(-1, tokens_N1)[:, 0]
    gradients = []
    for with_slope in (False, True):
        leaf_NV = logits_NV.clone().requires_grad_()
        log_q_N = leaf_NV.log_softmax(-1).gather(-1, tokens_N1)[:, 0]
        if with_slope:
            objective_N, slope_N = clipped_N(log_q_N.detach(), log_b_N, advantages_N, 0.2)
            (slope_N * -log_q_N).sum().backward()
            assert 0 < (slope_N == 0).sum() < 40
        else:
            ratio_N = (log_q_N - log_b_N).exp()
            objective_N = -torch.min(ratio_N * advantages_N, ratio_N.clamp(0.8, 1.2) * advantages_N)
            objective_N.sum().backward()
        gradients.append((objective_N.detach(), leaf_NV.grad))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-14)


def test_importance_weights_make_the_mixtures_samples_the_students() -> None:
    """Over the whole vocabulary, Σ b · (q / b) · f = Σ q · f: what is weighted is what was drawn from."""
    generator = torch.Generator().manual_seed(1)
    log_p_V, log_q_V = torch.randn(2, 9, generator=generator, dtype=torch.float64).log_softmax(-1)
    log_b_V = log_mixture(log_p_V, log_q_V, 0.2)
    torch.testing.assert_close(log_b_V.exp(), 0.8 * log_q_V.exp() + 0.2 * log_p_V.exp())
    values_V = torch.randn(9, generator=generator, dtype=torch.float64)
    weights_V = (log_q_V - log_b_V).exp()
    assert weights_V.max() <= 1 / 0.8 + 1e-12
    torch.testing.assert_close((log_b_V.exp() * weights_V * values_V).sum(), (log_q_V.exp() * values_V).sum())

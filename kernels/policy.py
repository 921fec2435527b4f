"""MiniLLM's policy gradient (Gu et al. 2024): rewards, returns, advantages, and PPO's clipped objective.

p is the teacher, q the student, b the law that the tokens were drawn from. Positions are flat and never padded, so no
mean or variance can take in what is not there. Arithmetic is in the type it is given.

Shape legend: N positions, T positions of one sequence, in order.
"""

import torch
from torch import Tensor

WHITENING_FLOOR = 1e-8  # added to the variance


def rewards_N(log_p_N: Tensor, log_q_N: Tensor, *, scale: float, limit: float) -> Tensor:
    """(log p − log q) / scale at each drawn token, cut to ± limit."""
    return ((log_p_N - log_q_N) / scale).clamp(-limit, limit)


def returns_T(rewards_T: Tensor, *, discount: float, own: bool = True) -> Tensor:
    """Discounted rewards from each position on, over how many positions they come from.

    Without ``own`` they begin at the next position, and the last one's return is 0.
    """
    length = len(rewards_T)
    # Sums over 1, 2, 4, … positions, each from the one before.
    total_T, reach = rewards_T, 1
    while reach < length:
        total_T = total_T + discount**reach * torch.nn.functional.pad(total_T[reach:], (0, reach))
        reach *= 2
    remaining_T = torch.arange(length, 0, -1, dtype=rewards_T.dtype, device=rewards_T.device)
    mean_T = total_T / remaining_T
    return mean_T if own else torch.nn.functional.pad(mean_T[1:], (0, 1))


def whiten_N(values_N: Tensor) -> Tensor:
    """Mean 0 and variance 1, both over all positions given: pass every sequence that is compared at once."""
    centred_N = values_N - values_N.mean()
    return centred_N * (centred_N.square().mean() + WHITENING_FLOOR).rsqrt()


def clipped_N(log_q_N: Tensor, log_b_N: Tensor, advantages_N: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's objective, to be minimised: −min(ρA, clip(ρ)A) with ρ = q / b and clip(ρ) within 1 ± clip.

    Also its slope along −log q: ρA where the clip does not hold, else 0. As a fixed weight of −log q it gives the
    objective's gradient.
    """
    ratio_N = (log_q_N - log_b_N).exp()
    free_N, held_N = ratio_N * advantages_N, ratio_N.clamp(1 - clip, 1 + clip) * advantages_N
    return -torch.minimum(free_N, held_N), torch.where(free_N <= held_N, free_N, 0.0)

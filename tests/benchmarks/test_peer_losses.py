"""Our losses are TRL's, on the same tensors: GKD's by β, MiniLLM's single-step loss and its returns."""

import pytest
import torch

from benchmarks.peer import VERSION, WITH_MINILLM, trl
from kernels.divergence import divergence_N, jsd, reverse_kl
from kernels.fused import fused_divergence
from kernels.policy import returns_T, rewards_N

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


@pytest.mark.long
@pytest.mark.parametrize("release", sorted({VERSION, WITH_MINILLM}))
def test_losses_are_trls(release: str) -> None:
    generator = torch.Generator().manual_seed(3)
    teacher_TV, student_TV = (3 * torch.randn(13, 37, generator=generator) for _ in range(2))
    kept_T = torch.arange(13) % 5 != 2
    labels = torch.where(kept_T, 1, -100)
    given = {"teacher": teacher_TV.tolist(), "student": student_TV.tolist(), "kept": labels.tolist(), "betas": BETAS}
    with trl("same", release, **given) as turn:
        theirs = turn()
    weights_T = kept_T / kept_T.sum()
    for beta in BETAS:
        plain = (divergence_N(teacher_TV, student_TV, jsd(beta)) * weights_T).sum()
        every_V = torch.eye(37)
        fused, _ = fused_divergence(student_TV, every_V, teacher_TV, every_V, weights_T, jsd(beta))
        for ours in (plain, fused):
            assert ours.item() == pytest.approx(theirs[f"gkd {beta}"], rel=1e-5)
    if release != WITH_MINILLM:
        return
    single = (divergence_N(teacher_TV, student_TV, reverse_kl()) * weights_T).sum()
    assert single.item() == pytest.approx(theirs["minillm"], rel=1e-5)
    # Without a discount: with one TRL divides by the sum of its powers, and MiniLLM's own code by the positions left.
    log_p_T, log_q_T = teacher_TV.log_softmax(-1)[:, 0], student_TV.log_softmax(-1)[:, 0]
    returns = returns_T(rewards_N(log_p_T, log_q_T, scale=1.0, limit=100.0), discount=1.0)
    assert returns.tolist() == pytest.approx([theirs[f"return {at}"] for at in range(13)], rel=1e-4, abs=1e-5)

"""The noise: uniform, independent across neighbours, the same in any batch, Gumbel in law, finite."""

import math

import pytest
import torch

from kernels.noise import COIN, TEACHER, draw, gumbel, sequence_key, uniform

torch.set_num_threads(1)


def keys(n: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor([sequence_key(seed, "example", i) for i in range(n)])


def uniforms(noise: torch.Tensor) -> torch.Tensor:
    """Undo g = -log(-log1p(-u))."""
    return -torch.expm1(-torch.exp(-noise))


def ks(u: torch.Tensor) -> float:
    """Kolmogorov–Smirnov distance of u from uniform, times sqrt(n): above 1.95 has probability 0.001."""
    u, n = u.flatten().sort().values.double(), u.numel()
    rank = torch.arange(1, n + 1, dtype=torch.float64) / n
    return max((rank - u).max().item(), (u - rank + 1 / n).max().item()) * math.sqrt(n)


def test_sequence_key_is_stable_and_tells_parts_apart():
    assert sequence_key(1, "a", 2) == 7171963100510836350
    different = {sequence_key(*p) for p in [(1, "a", 2), (2, "a", 1), (1, "a2"), (1, "a", "2"), (1, 2, "a"), (1,)]}
    assert len(different) == 6
    assert all(-(2**63) <= sequence_key(0, i) < 2**63 for i in range(100))


def test_uniform_in_law_over_each_coordinate():
    zeros, steps = torch.zeros(20000, dtype=torch.int64), torch.arange(20000)
    over_tokens = uniforms(gumbel(keys(1), zeros[:1], 20000, torch.float64))
    over_positions = uniform(keys(1).expand(20000), steps, COIN)
    over_sequences = uniform(keys(20000), zeros, COIN)
    over_raw_keys = uniform(steps, zeros, COIN)  # consecutive keys, should a caller not hash them
    for u in (over_tokens, over_positions, over_sequences, over_raw_keys):
        assert ks(u) < 1.95


def test_independent_across_neighbours():
    steps = torch.arange(300)
    g = uniforms(gumbel(keys(1).expand(300), steps, 300, torch.float64)) - 0.5
    row_keys = uniforms(gumbel(steps, torch.zeros_like(steps), 300, torch.float64)) - 0.5
    teacher = uniforms(gumbel(keys(1).expand(300), steps, 300, torch.float64, TEACHER)) - 0.5
    pairs = [(g[:, 1:], g[:, :-1]), (g[1:], g[:-1]), (g[1:, 1:], g[:-1, :-1]), (g[1:, :-1], g[:-1, 1:]),
             (row_keys[1:], row_keys[:-1]), (row_keys[1:, :-1], row_keys[:-1, 1:]), (g, teacher)]  # fmt: skip
    for a, b in pairs:
        for power in (1, 2):
            x, y = a**power - (a**power).mean(), b**power - (b**power).mean()
            z = (x * y).mean() / (x.std() * y.std()) * math.sqrt(x.numel())
            assert abs(z) < 4


def test_bits_do_not_depend_on_the_batch():
    k, t = keys(16), torch.arange(16) * 7
    whole = gumbel(k, t, 97)
    for i in (0, 5, 15):
        assert torch.equal(whole[i : i + 1], gumbel(k[i : i + 1], t[i : i + 1], 97))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole[order], gumbel(k[order], t[order], 97))
    assert torch.equal(whole[:, :50], gumbel(k, t, 50))  # a padded vocabulary changes nothing before the padding


def test_gumbel_moments_tail_and_precision():
    g = gumbel(keys(64), torch.zeros(64, dtype=torch.int64), 32768, torch.float64)
    assert g.isfinite().all()
    assert abs(g.mean().item() - 0.5772156649) < 4 * 1.2825 / math.sqrt(g.numel())
    assert abs(g.var().item() - math.pi**2 / 6) < 0.02
    for threshold in (5.0, 9.0):  # P(g > x) = 1 - exp(-exp(-x))
        expected = -math.expm1(-math.exp(-threshold)) * g.numel()
        assert abs((g > threshold).sum().item() - expected) < 4 * math.sqrt(expected)
    single = gumbel(keys(64), torch.zeros(64, dtype=torch.int64), 32768, torch.float32)
    likely = g > -1  # below, float32 cannot tell u from 1: noise that never wins a draw
    assert torch.allclose(single[likely].double(), g[likely], atol=3e-6)


def test_extreme_bits_stay_finite():
    from kernels.noise import _unit_interval

    for dtype in (torch.float32, torch.float64):
        u = _unit_interval(torch.tensor([0, -1]), dtype)
        g = -torch.log(-torch.log1p(-u))
        assert g.isfinite().all()
        assert g[0] > 37  # the tail reaches far beyond a 24-bit u's 16.6


def test_draw_follows_softmax():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0], dtype=torch.float64)
    n = 40000
    noise = gumbel(keys(1).expand(n), torch.arange(n), 4, torch.float64)
    seen = torch.bincount(draw(logits.expand(n, 4), noise), minlength=4).double()
    expected = logits.softmax(0) * n
    assert ((seen - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, 0.001


def test_low_precision_noise_is_refused():
    with pytest.raises(ValueError, match="float32"):
        gumbel(keys(1), torch.zeros(1, dtype=torch.int64), 8, torch.bfloat16)

"""The gate: divergences worked out by hand, every strategy's rule, ties, floors, and that it imports no torch."""

import math
import subprocess
import sys

import pytest
import torch

from kernels.gate import (
    Adaptive,
    Coin,
    Constant,
    ExponentialDecay,
    ExponentialGrowth,
    InTopK,
    LinearDecay,
    Sight,
    decide,
    divergences,
    jsd,
)

torch.set_num_threads(1)


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def sight(rows: int = 1, **given: torch.Tensor) -> Sight:
    nothing = {
        "position_B": torch.zeros(rows, dtype=torch.int64),
        "jsd_B": torch.zeros(rows),
        "kl_B": torch.zeros(rows),
        "coin_B": torch.full((rows,), 0.5),
        "teacher_logprobs_BV": torch.zeros(rows, 2),
        "draft_B": torch.zeros(rows, dtype=torch.int64),
        "earlier_kl_BT": torch.zeros(rows, 1),
        "earlier_teacher_BT": torch.zeros(rows, 1, dtype=torch.bool),
    }
    return Sight(**{**nothing, **given})


def test_divergences_by_hand():
    p, q = logs([0.5, 0.5]), logs([0.9, 0.1])
    # m = (0.7, 0.3)
    by_hand = 0.5 * (0.5 * math.log2(0.5 / 0.7) + 0.5 * math.log2(0.5 / 0.3))
    by_hand += 0.5 * (0.9 * math.log2(0.9 / 0.7) + 0.1 * math.log2(0.1 / 0.3))
    got, kl = divergences(p, q)
    assert got.item() == pytest.approx(by_hand, abs=1e-14)
    assert kl.item() == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), abs=1e-14)
    assert jsd(q, p).item() == pytest.approx(by_hand, abs=1e-14)  # symmetric; KL is not
    assert jsd(p, q, math.e).item() == pytest.approx(by_hand * math.log(2), abs=1e-14)


def test_jsd_at_its_ends():
    p = torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    assert torch.equal(jsd(p, p), torch.zeros(3, dtype=torch.float64))
    for dtype in (torch.float32, torch.float64):
        apart = torch.tensor([[0.0, -1e4], [-1e4, 0.0]], dtype=dtype).log_softmax(-1)
        assert jsd(apart[:1], apart[1:]).item() == pytest.approx(1.0, abs=2e-6)
        assert jsd(apart[:1], apart[1:]).item() <= 1.0  # so tau = 1 always lets the student write


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
def test_jsd_in_float32_keeps_its_relative_precision(size):
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(4, 1000, dtype=torch.float64, generator=generator).log_softmax(-1)
    q = (p + size * torch.randn(4, 1000, dtype=torch.float64, generator=generator)).log_softmax(-1)
    m = torch.logaddexp(p, q) - math.log(2)
    plain = 0.5 * ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1)) / math.log(2)
    torch.testing.assert_close(jsd(p, q), plain, rtol=1e-7, atol=0)
    torch.testing.assert_close(jsd(p.float(), q.float()).double(), plain, rtol=0.02, atol=0)


def test_thresholds_by_position():
    t = torch.tensor([0, 1, 24, 47])
    decay = ExponentialDecay().tau(t)
    assert decay.tolist() == pytest.approx([1.0, math.exp(-0.1), math.exp(-2.4), math.exp(-4.7)])
    assert decay[2] < 0.1
    assert decay[3] < 0.01
    assert LinearDecay(length=48).tau(t).tolist() == pytest.approx([1.0, 47 / 48, 0.5, 1 / 48])
    assert ExponentialGrowth().tau(t).tolist() == pytest.approx((1 - decay).tolist())
    assert Constant().tau(t).tolist() == [0.2] * 4
    assert ExponentialDecay(floor=0.05).tau(t)[3] == 0.05
    assert LinearDecay(length=10).tau(t)[3] == 0.0


def test_ties_go_to_the_student():
    at = torch.tensor([0.2, 0.2 + 1e-9, 0.2 - 1e-9], dtype=torch.float64)
    given = sight(3, position_B=torch.tensor([5, 5, 5]), jsd_B=at)
    assert decide(Constant(value=0.2), given).tolist() == [False, True, False]


def test_natural_logarithms_with_tau_ln2_decide_the_same():
    generator = torch.Generator().manual_seed(2)
    p, q = (torch.randn(200, 7, dtype=torch.float64, generator=generator).mul(2).log_softmax(-1) for _ in "pq")
    t = torch.arange(200) // 10
    bits, nats = ExponentialDecay(), ExponentialDecay(start=math.log(2), log_base=math.e)
    a = decide(bits, sight(200, position_B=t, jsd_B=jsd(p, q, bits.log_base)))
    b = decide(nats, sight(200, position_B=t, jsd_B=jsd(p, q, nats.log_base)))
    assert torch.equal(a, b)
    assert 20 < a.sum() < 180


def test_coin_looks_at_its_coin_alone():
    coins = torch.tensor([0.0, 0.19, 0.21, 0.99])
    assert decide(Coin(), sight(4, coin_B=coins, jsd_B=torch.ones(4))).tolist() == [True, True, False, False]
    assert decide(Coin(teacher_share=0.5), sight(4, coin_B=coins)).tolist() == [True, True, True, False]


def test_adaptive_switches_once_and_for_all():
    gate = Adaptive(factor=2.0, window=3)
    kl = torch.tensor([[1.0, 2.0, 3.0, 4.1, 0.1, 9.0]])
    wrote = torch.zeros(1, 6, dtype=torch.bool)
    got = []
    for t in range(6):
        given = sight(position_B=torch.tensor([t]), kl_B=kl[:, t], earlier_kl_BT=kl, earlier_teacher_BT=wrote)
        got.append(bool(decide(gate, given)))
        wrote[0, t] = got[-1]
    assert got == [False, False, False, True, True, True]  # 4.1 > 2 · mean(1, 2, 3), and the teacher writes the rest
    # What a buffer holds from t on is no history.
    stale = sight(
        position_B=torch.tensor([2]), kl_B=kl[:, 5], earlier_kl_BT=kl, earlier_teacher_BT=torch.ones_like(wrote)
    )
    stale.earlier_teacher_BT[:, :2] = False
    assert not decide(gate, stale)


def test_in_top_k_looks_at_the_draft():
    teacher = logs([0.4, 0.3, 0.2, 0.1]).expand(4, 4)
    given = sight(4, teacher_logprobs_BV=teacher, draft_B=torch.tensor([0, 1, 2, 3]))
    assert decide(InTopK(k=2), given).tolist() == [False, False, True, True]
    assert [gate.own_teacher_noise for gate in (InTopK, Coin, ExponentialDecay)] == [True, False, False]


def test_settings_out_of_range_are_refused():
    for make in (
        lambda: ExponentialDecay(floor=-0.1),
        lambda: Constant(log_base=1.0),
        lambda: LinearDecay(length=0),
        lambda: Coin(teacher_share=1.5),
        lambda: Adaptive(window=0),
        lambda: InTopK(k=0),
    ):
        with pytest.raises(ValueError, match=r"needs|probability|at least"):
            make()


def test_imports_no_torch():
    code = "import sys, kernels.gate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

"""The fused losses against the plain ones: values, gradients, and everything that must not change a result."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.divergence import (
    Divergence,
    divergence_N,
    forward_kl,
    jsd,
    reverse_kl,
    sampled_divergence_N,
    skewed_kl,
    skewed_reverse_kl,
    topk_divergence_N,
    total_variation,
)
from kernels.fused import fused_cross_entropy, fused_divergence, fused_topk_divergence

torch.set_num_threads(1)

MIXED = Divergence((*skewed_kl(0.3).terms, *reverse_kl().terms), variation=0.5)
EVERY = [
    forward_kl(),
    reverse_kl(),
    skewed_kl(0.1),
    skewed_reverse_kl(0.1),
    jsd(0.5),
    jsd(0.2),
    total_variation(),
    MIXED,
]
every = pytest.mark.parametrize("divergence", EVERY, ids=repr)


@dataclass(frozen=True)
class Case:
    """Inputs of the fused loss; hidden sizes of the two models differ on purpose."""

    student_hidden_NH: Tensor
    student_weight_VH: Tensor
    teacher_hidden_NG: Tensor
    teacher_weight_VG: Tensor
    weights_N: Tensor
    student_bias_V: Tensor | None = None
    teacher_bias_V: Tensor | None = None
    temperature: float = 1.0
    student_softcap: float | None = None
    teacher_softcap: float | None = None

    @property
    def learned(self) -> list[Tensor]:
        tensors = (self.student_hidden_NH, self.student_weight_VH, self.student_bias_V)
        return [tensor for tensor in tensors if tensor is not None]


def case(
    positions: int, vocabulary: int, *, seed: int = 0, dtype: torch.dtype = torch.float64, extras: bool = True
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    weights_N = torch.rand(positions, generator=generator, dtype=torch.float64)
    weights_N[::3] = 0.0
    plain = Case(
        normal(positions, 5).requires_grad_(),
        normal(vocabulary, 5).requires_grad_(),
        normal(positions, 3),
        normal(vocabulary, 3),
        weights_N,
    )
    if not extras:
        return plain
    bias_V = normal(vocabulary).requires_grad_()
    return replace(
        plain,
        student_bias_V=bias_V,
        teacher_bias_V=normal(vocabulary),
        temperature=1.7,
        student_softcap=3.0,
        teacher_softcap=4.0,
    )


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    scores = hidden.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def student_logits(c: Case) -> Tensor:
    return logits(c.student_hidden_NH, c.student_weight_VH, c.student_bias_V, c.student_softcap)


def teacher_logits(c: Case) -> Tensor:
    return logits(c.teacher_hidden_NG, c.teacher_weight_VG, c.teacher_bias_V, c.teacher_softcap)


def plain(c: Case, divergence: Divergence) -> tuple[Tensor, Tensor]:
    loss_N = divergence_N(teacher_logits(c), student_logits(c), divergence, c.temperature)
    return (c.weights_N * loss_N).sum(), loss_N * (c.weights_N != 0)


def fused(c: Case, divergence: Divergence, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
    return fused_divergence(
        c.student_hidden_NH,
        c.student_weight_VH,
        c.teacher_hidden_NG,
        c.teacher_weight_VG,
        c.weights_N,
        divergence,
        student_bias_V=c.student_bias_V,
        teacher_bias_V=c.teacher_bias_V,
        temperature=c.temperature,
        student_softcap=c.student_softcap,
        teacher_softcap=c.teacher_softcap,
        chunk_size=chunk_size,
    )


def stored(c: Case, k: int, *, sampled: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """The fused loss against the teacher's `k` best tokens, with its tail or (every importance 1) as a sample."""
    with torch.no_grad():
        log_p_NK, ids_NK = (
            teacher_logits(replace(c, teacher_hidden_NG=c.teacher_hidden_NG.nan_to_num())).log_softmax(-1).topk(k)
        )
    log_tail_N = torch.log1p(-log_p_NK.exp().sum(-1).clamp(max=1))
    importance_NK = torch.ones_like(log_p_NK) if sampled else None

    def loss(c: Case, divergence: Divergence = jsd(), chunk_size: int | None = None) -> tuple[Tensor, Tensor]:  # noqa: B008
        blank = c.teacher_hidden_NG.isnan().any(-1)[:, None]
        return fused_topk_divergence(
            c.student_hidden_NH,
            c.student_weight_VH,
            ids_NK,
            log_p_NK.masked_fill(blank, math.nan),
            None if sampled else log_tail_N.masked_fill(blank[:, 0], math.nan),
            c.weights_N,
            divergence,
            importance_NK=importance_NK,
            student_bias_V=c.student_bias_V,
            chunk_size=chunk_size,
        )

    return loss


def hard(c: Case, divergence: Divergence | None = None, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
    targets_N = torch.zeros(len(c.weights_N), dtype=torch.int64)
    return fused_cross_entropy(c.student_hidden_NH, c.student_weight_VH, targets_N, c.weights_N, chunk_size=chunk_size)


def every_loss(c: Case, k: int = 4) -> dict[str, Callable[..., tuple[Tensor, Tensor]]]:
    return {
        "full": fused,
        "top": stored(c, k, sampled=False),
        "sampled": stored(c, k, sampled=True),
        "cross entropy": hard,
    }


losses = pytest.mark.parametrize("kind", ["full", "top", "sampled", "cross entropy"])


def same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], learned: list[Tensor], **tolerance: float) -> None:
    torch.testing.assert_close(got[0].double(), want[0].detach(), **tolerance)
    torch.testing.assert_close(got[1].double(), want[1].detach(), **tolerance)
    got_grads = torch.autograd.grad(got[0] * 0.5, learned)
    want_grads = torch.autograd.grad(want[0] * 0.5, learned)
    for got_grad, want_grad, tensor in zip(got_grads, want_grads, learned, strict=True):
        assert got_grad.dtype == tensor.dtype
        torch.testing.assert_close(got_grad.double(), want_grad.double(), **tolerance)


@every
@given(
    positions=st.integers(1, 9),
    vocabulary=st.integers(2, 33),
    chunk_size=st.sampled_from([1, 2, 3, 100, None]),
    extras=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_equals_the_plain_loss_at_odd_shapes(
    divergence: Divergence, positions: int, vocabulary: int, chunk_size: int | None, extras: bool, seed: int
) -> None:
    c = case(positions, vocabulary, seed=seed, extras=extras)
    same(fused(c, divergence, chunk_size), plain(c, divergence), c.learned, rtol=1e-7, atol=1e-9)


@every
def test_gradcheck(divergence: Divergence) -> None:
    c = case(4, 6)
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: fused(
            replace(c, student_hidden_NH=hidden, student_weight_VH=weight, student_bias_V=bias), divergence, 2
        )[0],
        c.learned,
    )


@every
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)], ids=str
)
def test_narrow_types_are_computed_in_float32(divergence: Divergence, dtype: torch.dtype, tolerance: float) -> None:
    c = case(7, 19, dtype=dtype)
    got, want = fused(c, divergence, 3), plain(c, divergence)
    assert got[0].dtype == got[1].dtype == torch.float32
    torch.testing.assert_close(got[1].double(), want[1].detach(), rtol=1e-4, atol=1e-5)
    same((got[0], want[1].detach()), want, c.learned, rtol=tolerance, atol=tolerance)


def test_autocast_does_not_narrow_the_arithmetic() -> None:
    c = case(7, 19, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = fused(c, jsd(), 3)
    same(got, plain(c, jsd()), c.learned, rtol=2e-5, atol=2e-5)


@every
def test_student_equal_to_teacher_is_zero(divergence: Divergence) -> None:
    c = case(6, 11, extras=False)
    c = replace(c, teacher_hidden_NG=c.student_hidden_NH.detach(), teacher_weight_VG=c.student_weight_VH.detach())
    loss, loss_N = fused(c, divergence)
    assert loss_N.abs().max() < 1e-12
    if not divergence.variation:
        assert all(grad.abs().max() < 1e-12 for grad in torch.autograd.grad(loss, c.learned))


@every
@pytest.mark.parametrize("k", [4, 11])
@pytest.mark.parametrize("sampled", [False, True])
def test_student_equal_to_a_stored_teacher_is_zero(divergence: Divergence, k: int, sampled: bool) -> None:
    if sampled and k < 11 and divergence.impossible:
        pytest.skip("a sample of some tokens is right on average only")
    c = case(6, 11, extras=False)
    c = replace(c, teacher_hidden_NG=c.student_hidden_NH.detach(), teacher_weight_VG=c.student_weight_VH.detach())
    loss, loss_N = stored(c, k, sampled=sampled)(c, divergence)
    assert loss_N.abs().max() < 1e-12
    if not divergence.variation and (k == 11 or not sampled):
        assert all(grad.abs().max() < 1e-12 for grad in torch.autograd.grad(loss, c.learned))


@losses
@every
def test_no_position_gives_zero_and_zero_gradients(divergence: Divergence, kind: str) -> None:
    c = case(4, 6, extras=kind == "full")
    loss_of = every_loss(c)[kind]
    hidden_NH = c.student_hidden_NH.detach().fill_(math.nan).requires_grad_()
    masked = replace(c, student_hidden_NH=hidden_NH, weights_N=torch.zeros(4))
    masked = replace(masked, teacher_hidden_NG=torch.full_like(c.teacher_hidden_NG, math.nan))
    empty = replace(
        c, student_hidden_NH=hidden_NH[:0], teacher_hidden_NG=c.teacher_hidden_NG[:0], weights_N=torch.zeros(0)
    )
    for blank, loss_blank in ((masked, loss_of), (empty, every_loss(empty)[kind])):
        loss, loss_N = loss_blank(blank, divergence)
        assert loss.item() == 0.0
        assert (loss_N == 0).all()
        assert all((grad == 0).all() for grad in torch.autograd.grad(loss, blank.learned))


@losses
@every
def test_what_is_in_masked_positions_changes_nothing(divergence: Divergence, kind: str) -> None:
    c = case(7, 9, extras=kind == "full")
    loss_of, hidden_NH = every_loss(c)[kind], c.student_hidden_NH.detach().clone()
    want = loss_of(c, divergence)
    masked_N = c.weights_N == 0
    teacher_NG = c.teacher_hidden_NG.masked_fill(masked_N[:, None], math.nan)
    blank = replace(c, student_hidden_NH=hidden_NH, teacher_hidden_NG=teacher_NG)
    hidden_NH[masked_N] = math.nan
    hidden_NH.requires_grad_()
    got = loss_of(blank, divergence)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    for got_grad, want_grad in zip(
        torch.autograd.grad(got[0], blank.learned), torch.autograd.grad(want[0], c.learned), strict=True
    ):
        torch.testing.assert_close(got_grad, want_grad, rtol=0, atol=0)


def test_micro_batches_and_padding_sides_change_nothing() -> None:
    c = case(8, 13, seed=3)
    want, want_N = fused(c, skewed_reverse_kl(0.1))
    want_grads = torch.autograd.grad(want, c.learned)

    def part(rows: list[int]) -> Case:
        return replace(
            c,
            student_hidden_NH=c.student_hidden_NH[rows],
            teacher_hidden_NG=c.teacher_hidden_NG[rows],
            weights_N=c.weights_N[rows],
        )

    split = fused(part([0, 1, 2]), skewed_reverse_kl(0.1))[0] + fused(part([3, 4, 5, 6, 7]), skewed_reverse_kl(0.1))[0]
    # Padding is a position of weight 0, before or after: here rows 0 and 3, whose weights are 0, move to either end.
    kept = [1, 2, 4, 5, 7]
    for padded in ([0, 3, 6, *kept], [*kept, 6, 3, 0]):
        got, got_N = fused(part(padded), skewed_reverse_kl(0.1))
        torch.testing.assert_close(got_N, want_N[padded])
        for got_grad, want_grad in zip(torch.autograd.grad(got, c.learned), want_grads, strict=True):
            torch.testing.assert_close(got_grad, want_grad)
    for got_grad, want_grad in zip(torch.autograd.grad(split, c.learned), want_grads, strict=True):
        torch.testing.assert_close(got_grad, want_grad)


def test_impossible_tokens_give_no_nan() -> None:
    c = case(6, 9)
    bias_V = torch.zeros(9, dtype=torch.float64)
    bias_V[6:] = -math.inf
    for divergence in EVERY:
        masked = replace(c, teacher_bias_V=bias_V, teacher_softcap=None)
        got, want = fused(masked, divergence), plain(masked, divergence)
        assert got[0].isfinite()
        same(got, want, c.learned, rtol=1e-7, atol=1e-9)


def test_tied_weights_get_both_gradients() -> None:
    c = case(5, 7, extras=False)
    ids_N = torch.tensor([0, 3, 3, 6, 1])
    tied_VH = c.student_weight_VH

    def grad(loss_of: object) -> Tensor:
        assert callable(loss_of)
        hidden_NH = torch.tanh(tied_VH[ids_N])
        return torch.autograd.grad(loss_of(replace(c, student_hidden_NH=hidden_NH), jsd())[0], tied_VH)[0]

    torch.testing.assert_close(grad(fused), grad(plain))


def test_frozen_parts_get_no_gradient_and_none_is_made_without_grad() -> None:
    c = case(5, 7)
    frozen = replace(c, student_weight_VH=c.student_weight_VH.detach())
    (grad_NH,) = torch.autograd.grad(fused(frozen, jsd())[0], [c.student_hidden_NH])
    torch.testing.assert_close(grad_NH, torch.autograd.grad(plain(c, jsd())[0], [c.student_hidden_NH])[0])
    with torch.no_grad():
        loss, loss_N = fused(c, jsd())
    assert not loss.requires_grad
    torch.testing.assert_close(loss_N, plain(c, jsd())[1].detach())


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation put out."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self.elements = max(self.elements, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return out


@losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_tokens_by_vocabulary_is_ever_held(dtype: torch.dtype, kind: str) -> None:
    c = case(300, 70, dtype=dtype)
    loss_of = every_loss(c)[kind]
    with LargestTensor() as largest:
        loss_of(c, jsd(), chunk_size=8)[0].backward()
    # Hidden states (300 × 5) are the largest thing left; a chunk of logits is 8 × 70, all logits would be 300 × 70.
    assert largest.elements == 300 * 5


def test_a_second_scaled_backward_is_refused_rather_than_wrong() -> None:
    c = case(5, 7)
    loss = fused(c, jsd())[0] / 3
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("sampled", [False, True])
@every
@given(positions=st.integers(1, 6), vocabulary=st.integers(4, 20), seed=st.integers(0, 1000), extras=st.booleans())
@settings(max_examples=10, deadline=None, derandomize=True)
def test_stored_teacher_equals_the_plain_loss(
    divergence: Divergence, sampled: bool, positions: int, vocabulary: int, seed: int, extras: bool
) -> None:
    c = case(positions, vocabulary, seed=seed, extras=extras)
    k = 1 + seed % vocabulary
    log_p_NK, ids_NK = teacher_logits(c).log_softmax(-1).topk(k)
    log_p_NK[0, 1:] = -math.inf  # a position that stores fewer
    ids_NK[0, 1:] = 0
    log_tail_N = (1 - log_p_NK.exp().sum(-1)).clamp(min=0).log() if k < vocabulary else log_p_NK[:, 0] - math.inf
    importance_NK = torch.linspace(0.5, 2.0, k, dtype=torch.float64).expand(positions, k)
    plain_of = sampled_divergence_N if sampled else topk_divergence_N
    extra_N = importance_NK if sampled else log_tail_N
    loss_N = plain_of(ids_NK, log_p_NK, extra_N, student_logits(c), divergence, c.temperature)
    got = fused_topk_divergence(
        c.student_hidden_NH,
        c.student_weight_VH,
        ids_NK,
        log_p_NK,
        None if sampled else log_tail_N,
        c.weights_N,
        divergence,
        importance_NK=importance_NK if sampled else None,
        student_bias_V=c.student_bias_V,
        temperature=c.temperature,
        student_softcap=c.student_softcap,
        chunk_size=2,
    )
    same(got, ((c.weights_N * loss_N).sum(), loss_N * (c.weights_N != 0)), c.learned, rtol=1e-7, atol=1e-9)


@given(positions=st.integers(1, 9), vocabulary=st.integers(2, 33), seed=st.integers(0, 1000), extras=st.booleans())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_cross_entropy(positions: int, vocabulary: int, seed: int, extras: bool) -> None:
    c = case(positions, vocabulary, seed=seed, extras=extras)
    targets_N = torch.randint(vocabulary, (positions,), generator=torch.Generator().manual_seed(seed))
    loss_N = cross_entropy(student_logits(c), targets_N, reduction="none")
    want = ((c.weights_N * loss_N).sum(), loss_N * (c.weights_N != 0))
    targets_N = targets_N.index_fill(0, torch.arange(0, positions, 3), -100)  # never looked at: their weights are 0
    got = fused_cross_entropy(
        c.student_hidden_NH,
        c.student_weight_VH,
        targets_N,
        c.weights_N,
        bias_V=c.student_bias_V,
        softcap=c.student_softcap,
        chunk_size=2,
    )
    same(got, want, c.learned, rtol=1e-7, atol=1e-9)


def test_mistakes_are_refused_with_the_fix() -> None:
    c = case(4, 6)
    with pytest.raises(ValueError, match="cut both output projections"):
        fused(replace(c, teacher_weight_VG=c.teacher_weight_VG[:5]), jsd())
    with pytest.raises(ValueError, match="teacher_hidden_NG has 3 rows for 4 positions"):
        fused(replace(c, teacher_hidden_NG=c.teacher_hidden_NG[:3]), jsd())
    with pytest.raises(ValueError, match="weights_N has 3 rows"):
        fused(replace(c, weights_N=c.weights_N[:3]), jsd())
    with pytest.raises(ValueError, match="width 4, weight of 5"):
        fused(replace(c, student_hidden_NH=c.student_hidden_NH[:, :4]), jsd())
    with pytest.raises(ValueError, match="at least 1"):
        fused(c, jsd(), 0)
    ids_NK = torch.zeros(4, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="importance_NK for a sampled one"):
        fused_topk_divergence(
            c.student_hidden_NH, c.student_weight_VH, ids_NK, torch.zeros(4, 1), None, c.weights_N, jsd()
        )

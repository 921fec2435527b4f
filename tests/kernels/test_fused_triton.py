"""The Triton kernel against the plain divergence, in Triton's interpreter, and through the compiler for a GPU.

The interpreter is chosen when Triton is first imported, so those tests run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import fused
from kernels.divergence import (
    Divergence,
    divergence_N,
    forward_kl,
    jsd,
    reverse_kl,
    skewed_kl,
    skewed_reverse_kl,
    total_variation,
)

torch.set_num_threads(1)
pytest.importorskip("triton")

MIXED = Divergence((*skewed_kl(0.3).terms, *reverse_kl().terms), variation=0.5)
EVERY = [forward_kl(), reverse_kl(), skewed_kl(0.1), skewed_reverse_kl(0.1), jsd(0.2), total_variation(), MIXED]
every = pytest.mark.parametrize("divergence", EVERY, ids=repr)


def normal(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * 3).to(dtype)


if os.environ.get("TRITON_INTERPRET") == "1":
    from kernels import fused_triton

    def check(
        teacher_CV: torch.Tensor,
        student_CV: torch.Tensor,
        divergence: Divergence,
        temperature: float,
        caps: tuple[float | None, float | None],
        tolerance: float,
    ) -> None:
        def capped(raw_CV: torch.Tensor, cap: float | None) -> torch.Tensor:
            return raw_CV.double() if cap is None else cap * torch.tanh(raw_CV.double() / cap)

        reference_CV = student_CV.double().requires_grad_()
        want_C = divergence_N(capped(teacher_CV, caps[1]), capped(reference_CV, caps[0]), divergence, temperature)
        scale_C = torch.linspace(-0.5, 2.0, len(student_CV)).to(
            torch.float64 if student_CV.dtype == torch.float64 else torch.float32
        )
        (want_CV,) = torch.autograd.grad((want_C * scale_C).sum(), reference_CV)
        got_CV = student_CV.clone()
        got_C = fused_triton.divergence_(got_CV, teacher_CV, scale_C, divergence, temperature, *caps)
        torch.testing.assert_close(got_C.double(), want_C.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got_CV.double(), want_CV, rtol=tolerance, atol=tolerance)

    @every
    @given(
        positions=st.integers(1, 3),
        vocabulary=st.integers(2, 70),
        temperature=st.sampled_from([0.7, 1.0]),
        caps=st.sampled_from([(None, None), (5.0, None), (4.0, 6.0)]),
        seed=st.integers(0, 100),
    )
    @settings(max_examples=5, deadline=None, derandomize=True)
    def test_odd_shapes(
        divergence: Divergence,
        positions: int,
        vocabulary: int,
        temperature: float,
        caps: tuple[float | None, float | None],
        seed: int,
    ) -> None:
        fused_triton.BLOCK = 16  # so that small vocabularies span blocks
        teacher_CV, student_CV = (normal(positions, vocabulary, seed=seed + i, dtype=torch.float64) for i in (0, 1))
        check(teacher_CV, student_CV, divergence, temperature, caps, 1e-9)

    @every
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)], ids=str
    )
    def test_types(divergence: Divergence, dtype: torch.dtype, tolerance: float) -> None:
        fused_triton.BLOCK = 16
        teacher_CV, student_CV = (normal(2, 37, seed=i, dtype=dtype) for i in (0, 1))
        check(teacher_CV, student_CV, divergence, 1.0, (None, None), tolerance)

    @every
    def test_impossible_tokens_and_blocks(divergence: Divergence) -> None:
        fused_triton.BLOCK = 8
        teacher_CV, student_CV = (normal(2, 30, seed=i, dtype=torch.float64) for i in (0, 1))
        teacher_CV[:, :8] = -torch.inf  # the first block as a whole
        student_CV[1, 5] = -torch.inf
        check(teacher_CV, student_CV, divergence, 1.0, (None, None), 1e-9)

    def test_through_the_fused_loss(monkeypatch: pytest.MonkeyPatch) -> None:
        hidden_NH = normal(5, 4, seed=0, dtype=torch.float32).requires_grad_()
        weight_VH = normal(21, 4, seed=1, dtype=torch.float32).requires_grad_()
        teacher = (normal(5, 3, seed=2, dtype=torch.float32), normal(21, 3, seed=3, dtype=torch.float32))
        got, want = [], []
        for results, takes in ((want, False), (got, True)):
            monkeypatch.setattr(fused, "_takes_triton", lambda _, takes=takes: takes)
            loss, loss_N = fused.fused_divergence(
                hidden_NH,
                weight_VH,
                *teacher,
                torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0]),
                jsd(0.3),
                temperature=1.5,
                student_softcap=7.0,
                teacher_softcap=9.0,
                chunk_size=3,
            )
            results.extend([loss.detach(), loss_N, *torch.autograd.grad(loss, [hidden_NH, weight_VH])])
        for got_tensor, want_tensor in zip(got, want, strict=True):
            torch.testing.assert_close(got_tensor, want_tensor)

else:

    def test_everything_in_the_interpreter() -> None:
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__],
            env=os.environ | {"TRITON_INTERPRET": "1"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
        assert "[100%]" in run.stdout

    @pytest.mark.parametrize(("shares", "on_p", "on_q"), [((), (), ()), ((0.3, 1.0), (1.0, 0.0), (0.0, 1.0))])
    @pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
    def test_compiles_for_a_gpu(
        shares: tuple[float, ...],
        on_p: tuple[float, ...],
        on_q: tuple[float, ...],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        # The interpreter takes much that the compiler refuses. This needs no GPU, only the compiler in Triton's wheel.
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from kernels.fused_triton import divergence_kernel

        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        pointers = ("student_ptr", "teacher_ptr", "scale_ptr", "losses_ptr")
        integers = ("student_stride", "teacher_stride", "vocabulary")
        constants = {
            "STUDENT_CAP": 30.0,
            "TEACHER_CAP": 0.0,
            "SHARES": shares,
            "ON_P": on_p,
            "ON_Q": on_q,
            "VARIATION": 0.5,
            "FLOOR": -1e4,
            "TINY": 1e-38,
            "BLOCK": 256,
        }
        signature = {
            **dict.fromkeys(pointers, "*fp32"),
            **dict.fromkeys(integers, "i32"),
            "inverse_temperature": "fp32",
            **dict.fromkeys(constants, "constexpr"),
        }
        source = ASTSource(divergence_kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32))
        assert ".entry divergence_kernel" in compiled.asm["ptx"]

"""The rules of a rollout: distributions, draws, the gate and the end of a row.

Both decoders use these, one position of each row at a time, so they can differ only in how they come by the logits.
p = teacher, q = student.

Shapes: N sequences, B rows of them, T response positions, V vocabulary, D the teacher's width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernels import noise
from kernels.gate import Gate, Sight, decide, divergences
from kernels.rollout import Record

Role = Literal["student", "teacher"]


@dataclass(frozen=True)
class Sampling:
    """How a model's draw is taken from its logits. The gate always looks at temperature 1 and the whole vocabulary."""

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"{self}: needs temperature > 0 and 0 < top_p <= 1")

    def warp(self, logprobs_BV: Tensor) -> Tensor:
        """Log-weights [B, V] to draw from: tempered, -inf outside the smallest set of mass top_p."""
        warped_BV = logprobs_BV if self.temperature == 1 else logprobs_BV / self.temperature
        if self.top_p == 1:
            return warped_BV
        sorted_BV, order_BV = warped_BV.sort(-1, descending=True)
        before_BV = sorted_BV.softmax(-1).cumsum(-1).roll(1, -1)
        before_BV[:, 0] = 0.0  # the best token always stays
        kept_BV = sorted_BV.masked_fill(before_BV >= self.top_p, -torch.inf)
        return torch.empty_like(warped_BV).scatter_(-1, order_BV, kept_BV)


@dataclass(frozen=True)
class Rules:
    """All that decides tokens beside the logits."""

    gate: Gate
    keys_N: Tensor
    limits_N: Tensor
    eos_E: Tensor
    student: Sampling
    teacher: Sampling
    vocab_size: int | None
    dtype: torch.dtype  # of log-probabilities and noise: float32, or float64 if a model has it

    @classmethod
    def of(
        cls,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        prompts: Sequence[Tensor],
        keys_N: Tensor,
        gate: Gate,
        max_new_tokens: int | Sequence[int],
        eos_ids: Sequence[int],
        student_sampling: Sampling,
        teacher_sampling: Sampling,
        vocab_size: int | None,
    ) -> "Rules":
        """The checked rules for these models and prompts. Raises ValueError with the fix."""
        widths = [model.config.get_text_config().vocab_size for model in (student, teacher)]
        if vocab_size is None and widths[0] != widths[1]:
            raise ValueError(
                f"the student has {widths[0]} logits and the teacher {widths[1]}: pass vocab_size, the number of "
                "tokens of their common tokenizer"
            )
        if vocab_size is not None and vocab_size > min(widths):
            raise ValueError(f"vocab_size {vocab_size} is more than the models' logits, {widths}")
        if student.device != teacher.device:
            raise ValueError(f"student on {student.device}, teacher on {teacher.device}: move them to one device")
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        if not prompts or any(prompt.ndim != 1 or not len(prompt) for prompt in prompts):
            raise ValueError("prompts must be a non-empty list of 1-D tensors of at least one token (a BOS will do)")
        if len(keys_N) != len(prompts) or len(limits) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many keys ({len(keys_N)}) and limits ({len(limits)})")
        if keys_N.dtype != torch.int64:
            raise ValueError(f"keys are int64 from kernels.noise.sequence_key, not {keys_N.dtype}")
        if min(limits) < 1:
            raise ValueError("max_new_tokens must be at least 1 for every row: leave out rows with nothing to write")
        limits_N = torch.tensor(limits, device=student.device)
        eos_E = torch.tensor(list(eos_ids), dtype=torch.int64, device=student.device)
        dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        keys_N = keys_N.to(student.device)
        return cls(gate, keys_N, limits_N, eos_E, student_sampling, teacher_sampling, vocab_size, dtype)

    def logprobs(self, logits_BV: Tensor) -> Tensor:
        """Log-probabilities [B, V] over the common vocabulary."""
        if self.vocab_size is not None:
            logits_BV = logits_BV[:, : self.vocab_size]
        return logits_BV.to(self.dtype).log_softmax(-1)

    def noise(self, role: Role, seq_B: Tensor, t_B: Tensor, vocab_size: int) -> Tensor:
        """Gumbel noise [B, V] of a model's draw: the same for both, unless the gate looks at the draw."""
        stream = noise.TEACHER if role == "teacher" and self.gate.own_teacher_noise else noise.SHARED
        return noise.gumbel(self.keys_N[seq_B], t_B, vocab_size, self.dtype, stream)

    def draw(self, role: Role, logprobs_BV: Tensor, noise_BV: Tensor) -> Tensor:
        """The model's draw [B]."""
        sampling = self.student if role == "student" else self.teacher
        return noise.draw(sampling.warp(logprobs_BV), noise_BV)

    def settle(
        self,
        record: Record,
        seq_B: Tensor,
        t_B: Tensor,
        teacher_logprobs_BV: Tensor,
        student_logprobs_BV: Tensor,
        teacher_draw_B: Tensor,
        student_draw_B: Tensor,
    ) -> Tensor:
        """Let the gate decide position t of each row; write it down; return the emitted tokens [B]."""
        jsd_B, kl_B = divergences(teacher_logprobs_BV, student_logprobs_BV, self.gate.log_base)
        coin_B = noise.uniform(self.keys_N[seq_B], t_B, noise.COIN)
        earlier = record.kl_NT[seq_B], record.teacher_NT[seq_B]
        sight = Sight(t_B, jsd_B, kl_B, coin_B, teacher_logprobs_BV, student_draw_B, *earlier)
        teacher_B = decide(self.gate, sight)
        token_B = torch.where(teacher_B, teacher_draw_B, student_draw_B)
        record.write(seq_B, t_B, token_B, teacher_B, teacher_draw_B == student_draw_B, jsd_B, kl_B)
        return token_B

    def ends(self, token_B: Tensor, seq_B: Tensor, t_B: Tensor) -> Tensor:
        """Rows [B] whose last token `token`, at position t, is: EOS or the row's limit."""
        return torch.isin(token_B, self.eos_E) | (t_B + 1 >= self.limits_N[seq_B])


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode within; afterwards every module has its own mode again."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Head:
    """What a model's output projection was last given."""

    input_BQD: Tensor


@contextmanager
def watch_head(model: PreTrainedModel) -> Iterator[Head]:
    """Within, `input_BQD` holds the hidden states that the model's last forward turned into logits."""
    head = Head()

    def remember(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        head.input_BQD = args[0]

    handle = model.get_output_embeddings().register_forward_pre_hook(remember)
    try:
        yield head
    finally:
        handle.remove()

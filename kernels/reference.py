"""SWITCH decoding as published: token by token, one forward of each model per token. The twin of `blockwise`.

It shares the rules with `blockwise` and nothing else: rows are padded on the left, and the caches are transformers'
own. Finished rows leave the batch.

Shapes: N sequences, B rows still running, T response positions, V vocabulary, D the teacher's width, L prompt slots.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from kernels.gate import Gate
from kernels.packed import packed
from kernels.rollout import Forwards, Record, Rollout
from kernels.rules import Rules, Sampling, evaluating, watch_head


class Padded:
    """A model with the cache of left-padded rows."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Tensor]):
        longest = max(map(len, prompts))
        ids_BL = torch.zeros(len(prompts), longest, dtype=torch.int64, device=model.device)
        mask_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids_BL[row, longest - len(prompt) :] = prompt.to(model.device)
            mask_BL[row, longest - len(prompt) :] = True
        self.model, self.mask_BL, self.forwards = model, mask_BL, Forwards()
        self.last_B = ids_BL[:, -1]
        self.cache = DynamicCache(config=model.config)
        if ids_BL.shape[1] > 1:  # all but the last prompt token, which is fed first
            self._run(ids_BL[:, :-1], mask_BL[:, :-1])
            self.forwards.prompt_positions = ids_BL[:, :-1].numel()

    def next(self, token_B: Tensor) -> Tensor:
        """Feed one token a row; logits [B, V] of the next."""
        rows, t = len(token_B), self.forwards.calls
        self.forwards.ran([t] * rows, 1, [t + 1] * rows)
        logits_BV = self._run(token_B[:, None], self.mask_BL)
        self.mask_BL = nn.functional.pad(self.mask_BL, (0, 1), value=True)
        return logits_BV

    def keep(self, rows_B: Tensor) -> None:
        self.cache.batch_select_indices(rows_B)
        self.mask_BL = self.mask_BL[rows_B]

    def _run(self, ids_BQ: Tensor, mask_BL: Tensor) -> Tensor:
        positions_BQ = (mask_BL.cumsum(1) - 1).clamp(min=0)[:, -ids_BQ.shape[1] :]
        output = self.model(
            input_ids=ids_BQ,
            attention_mask=mask_BL,
            position_ids=positions_BQ,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


@torch.no_grad()
def reference(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompts: Sequence[Tensor],
    keys_B: Tensor,
    gate: Gate,
    *,
    max_new_tokens: int | Sequence[int],
    eos_ids: Sequence[int],
    keep_teacher_hidden: bool = False,
    student_sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    teacher_sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    vocab_size: int | None = None,
) -> Rollout:
    """Continue each prompt (1-D ids) until EOS or its limit (one for all, or one per row), by method.md, section 1.

    `keys_B` are the rows' noise keys (`noise.sequence_key`, int64, one per prompt). `vocab_size` cuts both models'
    logits to the common tokenizer when they are padded differently. The models run in eval mode and get their mode
    back. Raises ValueError with the fix for inputs that do not fit together.
    """
    rules = Rules.of(
        student,
        teacher,
        prompts,
        keys_B,
        gate,
        max_new_tokens,
        eos_ids,
        student_sampling,
        teacher_sampling,
        vocab_size,
    )
    record = Record(rules.limits_N, rules.dtype)
    lengths = [0] * len(prompts)

    with evaluating(student, teacher), packed(student, teacher), watch_head(teacher) as head:
        q, p = Padded(student, prompts), Padded(teacher, prompts)
        seq_B, token_B = torch.arange(len(prompts), device=student.device), q.last_B
        for t in range(record.longest):
            t_B = torch.full_like(seq_B, t)
            q_BV, p_BV = rules.logprobs(q.next(token_B)), rules.logprobs(p.next(token_B))
            q_noise_BV = rules.noise("student", seq_B, t_B, q_BV.shape[1])
            p_noise_BV = rules.noise("teacher", seq_B, t_B, p_BV.shape[1]) if gate.own_teacher_noise else q_noise_BV
            draft_B = rules.draw("student", q_BV, q_noise_BV)
            token_B = rules.settle(record, seq_B, t_B, p_BV, q_BV, rules.draw("teacher", p_BV, p_noise_BV), draft_B)
            record.keep_cut(seq_B, t_B, token_B != draft_B)
            if keep_teacher_hidden:
                record.keep_hidden(seq_B, t_B, head.input_BQD[:, -1])

            ended_B = rules.ends(token_B, seq_B, t_B)
            if ended_B.any():
                for sequence in seq_B[ended_B].tolist():
                    lengths[sequence] = t + 1
                rows_B = (~ended_B).nonzero()[:, 0]
                if not len(rows_B):
                    break
                seq_B, token_B = seq_B[rows_B], token_B[rows_B]
                q.keep(rows_B)
                p.keep(rows_B)
    return record.finish(lengths, q.forwards, p.forwards)

"""Rollouts that one model writes by itself: what GKD and its relatives train on. Noise, rules and record are SWITCH's.

Shapes: N sequences, B rows still running, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kernels.gate import Constant
from kernels.packed import packed
from kernels.reference import Padded
from kernels.rollout import Forwards, Record, Rollout
from kernels.rules import Rules, Sampling, evaluating


@torch.no_grad()
def alone(
    student: PreTrainedModel,
    prompts: Sequence[Tensor],
    keys_B: Tensor,
    *,
    max_new_tokens: int | Sequence[int],
    eos_ids: Sequence[int],
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    vocab_size: int | None = None,
) -> Rollout:
    """`reference` without a teacher: each token is the student's draw from its own distribution, by the same noise.

    The rollout has no interventions, no teacher's hidden states, and a Jensen-Shannon divergence of 0 everywhere.
    """
    gate = Constant(value=1.0)
    rules = Rules.of(student, student, prompts, keys_B, gate, max_new_tokens, eos_ids, sampling, sampling, vocab_size)
    record = Record(rules.limits_N, rules.dtype)
    lengths = [0] * len(prompts)
    with evaluating(student), packed(student):
        model = Padded(student, prompts)
        seq_B, token_B = torch.arange(len(prompts), device=student.device), model.last_B
        for t in range(record.longest):
            t_B = torch.full_like(seq_B, t)
            logprobs_BV = rules.logprobs(model.next(token_B))
            token_B = rules.draw("student", logprobs_BV, rules.noise("student", seq_B, t_B, logprobs_BV.shape[1]))
            own_B, none_B = torch.zeros_like(seq_B, dtype=torch.bool), torch.zeros_like(logprobs_BV[:, 0])
            record.write(seq_B, t_B, token_B, own_B, ~own_B, none_B, none_B)
            ended_B = rules.ends(token_B, seq_B, t_B)
            if ended_B.any():
                for sequence in seq_B[ended_B].tolist():
                    lengths[sequence] = t + 1
                rows_B = (~ended_B).nonzero()[:, 0]
                if not len(rows_B):
                    break
                seq_B, token_B = seq_B[rows_B], token_B[rows_B]
                model.keep(rows_B)
    return record.finish(lengths, model.forwards, Forwards())

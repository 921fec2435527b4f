"""How close a decision was: where rounding lets two decoders differ, a margin is tiny (method.md, section 2).

Decoders that feed a model one token or many round its logits differently. In float64 that decides nothing; in float32
the first token in which two rollouts of a row differ must be a near tie, and everything behind it follows another
prefix.

Shapes: T response positions, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kernels import noise
from kernels.gate import Coin, Threshold, jsd
from kernels.rules import evaluating


@dataclass(frozen=True)
class Margin:
    gate: float  # |JSD - tau|, in the gate's log base; infinite for a coin
    draw: float  # gap between the two best perturbed log-probabilities of the writer, nats

    def near(self, tolerance: float) -> bool:
        """Whether rounding of this size may have decided."""
        return min(self.gate, self.draw) <= tolerance


def first_difference(tokens_T: Tensor, other_T: Tensor) -> int | None:
    """The first position where two rollouts of one row differ, one ending before the other included."""
    length = min(len(tokens_T), len(other_T))
    different = (tokens_T[:length] != other_T[:length]).nonzero()
    if len(different):
        return int(different[0])
    return None if len(tokens_T) == len(other_T) else length


@torch.no_grad()
def margin(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompt: Tensor,
    tokens_T: Tensor,
    key: int,
    gate: Threshold | Coin,
    position: int,
    vocab_size: int | None = None,
) -> Margin:
    """The margins of the decision at `position`, behind prompt and tokens[:position], at temperature 1."""
    ids = torch.cat([prompt, tokens_T[:position]])[None].to(student.device)
    key_1, position_1 = torch.tensor([key], device=ids.device), torch.tensor([position], device=ids.device)
    with evaluating(student, teacher):
        q_1V, p_1V = (
            m(ids, logits_to_keep=1).logits[:, -1, :vocab_size].double().log_softmax(-1) for m in (student, teacher)
        )
    if isinstance(gate, Threshold):
        beyond = float(jsd(p_1V, q_1V, gate.log_base) - gate.tau(position_1))
        teacher_writes, gap = beyond > 0, abs(beyond)
    else:
        coin_1 = noise.uniform(key_1, position_1, noise.COIN)
        teacher_writes, gap = bool(coin_1 < gate.teacher_share), torch.inf
    perturbed_1V = (p_1V if teacher_writes else q_1V) + noise.gumbel(key_1, position_1, p_1V.shape[-1], p_1V.dtype)
    best = perturbed_1V.topk(2).values[0]
    return Margin(gap, float(best[0] - best[1]))

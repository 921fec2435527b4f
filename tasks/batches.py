"""Training data: the order that rows and prompts are drawn in, sequences of them, and padded micro-batches.

Shape legend: M rows, B sequences, L padded length, T response tokens of a sequence, N response positions of a batch,
G teacher width.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from kernels.noise import sequence_key


def chance(seed: int, *parts: int | str) -> float:
    """A number in [0, 1) that depends on its arguments only."""
    return (sequence_key(seed, *parts) % 2**64) / 2**64


class Order:
    """An endless order of ``size`` items, each once per visit, shuffled anew at every visit: a function of the seed."""

    def __init__(self, size: int, seed: int, name: str) -> None:
        self.size, self.seed, self.name = size, seed, name
        self._visit, self._shuffled = -1, torch.empty(0, dtype=torch.int64)

    def at(self, k: int) -> tuple[int, int]:
        """(item, visit) of the k-th draw."""
        visit, place = divmod(k, self.size)
        if self._visit != visit:
            generator = torch.Generator().manual_seed(sequence_key(self.seed, "order", self.name, visit))
            self._visit = visit
            torch.randperm(self.size, generator=generator, out=self._shuffled)
        return int(self._shuffled[place]), visit


@dataclass(frozen=True)
class Sequence:
    """A prompt and a response. ``teacher_hidden_TG``: what the teacher's projection saw at each response position;
    ``distributions``: the teacher's there, as the annotation kept them, or with ``soft`` a mentor's; ``drawn_2T``: of
    each token the log-probability it was drawn with, and its advantage, where the method has such."""

    name: str
    prompt: Tensor
    response: Tensor
    weight: float = 1.0
    on_policy: bool = False
    teacher_hidden_TG: Tensor | None = None
    distributions: bytes | None = None
    soft: bool = False
    drawn_2T: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def row_sequence(rows: pa.Table, index: int) -> Sequence:
    row = rows.slice(index, 1).to_pylist()[0]
    prompt, response = torch.tensor(row["prompt_token_ids"]), torch.tensor(row["token_ids"])
    labels = {"distributions": row.get("distributions"), "soft": row.get("soft", False)}
    return Sequence(row["row_id"], prompt, response, row["weight"], **labels)


def row_lengths(rows: pa.Table) -> np.ndarray:
    """Tokens of each row, prompt and response: int32 [M]."""
    return pc.add(*(pc.list_value_length(rows[name]) for name in ("prompt_token_ids", "token_ids"))).to_numpy()


def prompt_of(prompts: pa.Table, index: int) -> tuple[str, Tensor]:
    row = prompts.slice(index, 1).to_pylist()[0]
    return row["prompt_id"], torch.tensor(row["prompt_token_ids"])


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences and their response positions, flat. No mask: with causal attention nothing that counts
    can see the padding behind it."""

    ids_BL: Tensor
    where_N: Tensor  # index, into B x L, of the position that predicts the response token: the one before it
    targets_N: Tensor
    weights_N: Tensor  # float64: it carries the division by the global token count
    on_policy_N: Tensor

    def only(self, chosen_N: Tensor) -> "Batch":
        """The same sequences with these response positions only."""
        parts = (self.where_N, self.targets_N, self.weights_N, self.on_policy_N)
        return Batch(self.ids_BL, *(part[chosen_N] for part in parts))


def collate(sequences: list[Sequence], device: torch.device) -> Batch:
    """The batch of these sequences; of none, a batch of one padding token with N = 0 (a worker without work must run
    the same collectives as the others)."""
    longest = max(map(len, sequences), default=1)
    ids_BL = torch.zeros(max(1, len(sequences)), longest, dtype=torch.int64)
    where, targets, weights, on_policy = [], [], [], []
    for row, sequence in enumerate(sequences):
        start, end = len(sequence.prompt), len(sequence)
        ids_BL[row, :start], ids_BL[row, start:end] = sequence.prompt, sequence.response
        where.append(torch.arange(start - 1, end - 1) + row * longest)
        targets.append(sequence.response)
        weights.append(torch.full((end - start,), sequence.weight, dtype=torch.float64))
        on_policy.append(torch.full((end - start,), sequence.on_policy))
    return Batch(
        ids_BL.to(device),
        torch.cat([torch.empty(0, dtype=torch.int64), *where]).to(device),
        torch.cat([torch.empty(0, dtype=torch.int64), *targets]).to(device),
        torch.cat([torch.empty(0, dtype=torch.float64), *weights]).to(device),
        torch.cat([torch.empty(0, dtype=torch.bool), *on_policy]).to(device),
    )


def micro_batches(lengths: list[int] | np.ndarray, size: int, count: int) -> Iterator[list[int]]:
    """Exactly ``count`` lists of at most ``size`` items, alike in length; the last ones may be empty."""
    assert math.ceil(len(lengths) / size) <= count, f"{len(lengths)} sequences do not fit {count} batches of {size}"
    longest_first = np.argsort(-np.asarray(lengths), kind="stable")
    for i in range(count):
        yield longest_first[i * size : (i + 1) * size].tolist()

"""Training data: rows and prompts from Parquet, the order they are drawn in, and padded micro-batches.

Shape legend: B sequences, L padded length, T response tokens of a sequence, N response positions of a batch, G teacher
width.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from infra.manifest import Manifest, read_table
from infra.store import Store
from kernels.noise import sequence_key
from tasks.schemas import CHARGED, KEPT

KEPT_COLUMNS = ["row_id", "prompt_id", "prompt_token_ids", "token_ids", "weight"]
CHARGED_COLUMNS = ["prompt_id", "prompt_token_ids"]


def chance(seed: int, *parts: int | str) -> float:
    """A number in [0, 1) that depends on its arguments only."""
    return (sequence_key(seed, *parts) % 2**64) / 2**64


@dataclass(frozen=True)
class Data:
    """What a stage trains on. ``left_out`` counts what it does not use, by reason."""

    rows: pa.Table
    validation: pa.Table
    prompts: pa.Table
    left_out: dict[str, int]


def read_data(
    store: Store,
    inputs: list[Manifest],
    auxiliary: list[Manifest] | None = None,
    *,
    seed: int,
    validation_share: float,
    max_length: int,
    max_new_tokens: int,
    stored: bool = False,
    soft: list[Manifest] | None = None,
) -> Data:
    """Kept rows and charged prompts of all inputs, and kept rows of the ``auxiliary`` ones; ``max_new_tokens`` 0: the
    method starts no rollouts; ``stored``: rows bring the teacher's distributions along; ``soft``: inputs with rows of a
    mentor, which bring the mentor's.

    The side of a prompt, training or validation, is drawn by its id and the seed: all its rows fall on one side, in
    every stage of a run, and no rollout starts from a validation prompt. Auxiliary rows of validation prompts are not
    used at all, and a mentor's are trained on only: what the teacher's answers are worth chooses the weights.
    """
    columns, left_out = [*KEPT_COLUMNS, "distributions"] if stored else KEPT_COLUMNS, Counter[str]()

    def fitting(rows: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Rows of usable length, to train on and of validation prompts."""
        prompt_T, response_T = (pc.list_value_length(rows[name]) for name in ("prompt_token_ids", "token_ids"))
        short = pc.less_equal(pc.add(prompt_T, response_T), max_length)
        empty = pc.equal(pc.multiply(prompt_T, response_T), 0)
        left_out.update(rows_too_long=_count(pc.invert(short)), rows_empty=_count(empty))
        rows = rows.filter(pc.and_not(short, empty))
        held_out = _held_out(rows, seed, validation_share)
        if "soft" in rows.column_names:
            held_out = pc.and_not(held_out, rows["soft"])
        return rows.filter(pc.invert(held_out)), rows.filter(held_out)

    kept = _concat(store, inputs, "kept", KEPT, columns)
    if soft is not None:
        kept = _beside(kept, _concat(store, soft, "kept", KEPT, [*KEPT_COLUMNS, "distributions"]))
    kept, validation = fitting(kept)
    if auxiliary:
        targets, unused = fitting(_concat(store, auxiliary, "kept", KEPT, columns))
        left_out["auxiliary_of_validation"] = unused.num_rows
        if soft is not None:
            targets = _beside(targets, _concat(store, [], "kept", KEPT, [*KEPT_COLUMNS, "distributions"]))
        kept = pa.concat_tables([kept, targets])

    prompts = CHARGED.empty_table().select(CHARGED_COLUMNS)
    if max_new_tokens:
        prompts = _first_of_each(_concat(store, inputs, "charged", CHARGED, CHARGED_COLUMNS))
        room = pc.less_equal(pc.list_value_length(prompts["prompt_token_ids"]), max_length - max_new_tokens)
        left_out["prompts_too_long"] = _count(pc.invert(room))
        prompts = prompts.filter(room)
        held_out_prompts = _held_out(prompts, seed, validation_share)
        left_out["prompts_of_validation"] = _count(held_out_prompts)
        prompts = prompts.filter(pc.invert(held_out_prompts))
    return Data(kept, validation, prompts, dict(left_out))


def _concat(store: Store, inputs: list[Manifest], table: str, schema: pa.Schema, columns: list[str]) -> pa.Table:
    parts = (part for manifest in inputs for part in read_table(store, manifest, table, columns))
    return pa.concat_tables([schema.empty_table().select(columns), *parts])


def _beside(kept: pa.Table, soft: pa.Table) -> pa.Table:
    """Rows with a mentor's behind them; column ``soft`` tells them apart."""
    if "distributions" not in kept.column_names:
        kept = kept.append_column("distributions", pa.nulls(kept.num_rows, pa.binary()))
    return pa.concat_tables(
        table.append_column("soft", pa.array([flag] * table.num_rows, pa.bool_()))
        for flag, table in ((False, kept), (True, soft))
    )


def _count(mask: pa.BooleanArray) -> int:
    return pc.sum(mask).as_py() or 0


def _held_out(table: pa.Table, seed: int, share: float) -> pa.BooleanArray:
    ids = table["prompt_id"].to_pylist()
    return pa.array([chance(seed, "validation", prompt_id) < share for prompt_id in ids], pa.bool_())


def _first_of_each(prompts: pa.Table) -> pa.Table:
    first = {prompt_id: i for i, prompt_id in reversed(list(enumerate(prompts["prompt_id"].to_pylist())))}
    return prompts.take(pa.array(sorted(first.values()), pa.int64()))


class Order:
    """An endless order of ``size`` items, each once per visit, shuffled anew at every visit: a function of the seed."""

    def __init__(self, size: int, seed: int, name: str) -> None:
        self.size, self.seed, self.name = size, seed, name
        self._shuffled: tuple[int, list[int]] = (-1, [])

    def at(self, k: int) -> tuple[int, int]:
        """(item, visit) of the k-th draw."""
        visit, place = divmod(k, self.size)
        if self._shuffled[0] != visit:
            generator = torch.Generator().manual_seed(sequence_key(self.seed, "order", self.name, visit))
            self._shuffled = visit, torch.randperm(self.size, generator=generator).tolist()
        return self._shuffled[1][place], visit


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


def micro_batches(sequences: list[Sequence], size: int, count: int) -> Iterator[list[Sequence]]:
    """Exactly ``count`` lists of at most ``size`` sequences, alike in length; the last ones may be empty."""
    assert math.ceil(len(sequences) / size) <= count, f"{len(sequences)} sequences do not fit {count} batches of {size}"
    by_length = sorted(sequences, key=len, reverse=True)
    for i in range(count):
        yield by_length[i * size : (i + 1) * size]

"""What a training stage trains on, validates by and continues: rows of Parquet, filtered part by part.

They lie on the disk of the worker's machine, and are read from there when a batch is made; none are in its memory.

Shape legend: N prompts of a batch, M prompts before it.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.manifest import Manifest
from infra.mapped import Spool, joined
from infra.parts import read_table
from infra.store import Store
from tasks.batches import chance
from tasks.schemas import CHARGED, KEPT

KEPT_COLUMNS = ["row_id", "prompt_id", "prompt_token_ids", "token_ids", "weight"]
CHARGED_COLUMNS = ["prompt_id", "prompt_token_ids"]


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
    method starts no rollouts; ``stored``: rows bring the teacher's distributions along; ``soft``: inputs with rows of
    a mentor, which bring the mentor's.

    The side of a prompt, training or validation, is drawn by its id and the seed: all its rows fall on one side, in
    every stage of a run, and no rollout starts from a validation prompt. Auxiliary rows of validation prompts are not
    used at all: what the answers are worth chooses the weights. A mentor's rows are trained on only: what it wrote is
    no measure of the student.
    """
    columns = [*KEPT_COLUMNS, "distributions"] if stored else KEPT_COLUMNS
    left_out = Counter(rows_too_long=0, rows_empty=0)

    def fitting(manifests: list[Manifest], columns: list[str]) -> tuple[pa.Table, pa.Table]:
        """Rows of usable length, to train on and of validation prompts."""
        train, validation = (Spool(_schema(KEPT, columns)) for _ in range(2))
        for rows in _batches(store, manifests, "kept", columns):
            prompt_T, response_T = (pc.list_value_length(rows[name]) for name in ("prompt_token_ids", "token_ids"))
            short = pc.less_equal(pc.add(prompt_T, response_T), max_length)
            empty = pc.equal(pc.multiply(prompt_T, response_T), 0)
            left_out.update(rows_too_long=_count(pc.invert(short)), rows_empty=_count(empty))
            rows = rows.filter(pc.and_not(short, empty))
            held_out = _held_out(rows, seed, validation_share)
            train.write(rows.filter(pc.invert(held_out)))
            validation.write(rows.filter(held_out))
        return train.table(), validation.table()

    kept, validation = fitting(inputs, columns)
    if auxiliary:
        targets, unused = fitting(auxiliary, columns)
        left_out["auxiliary_of_validation"] = unused.num_rows
        kept = pa.concat_tables([kept, targets])
    if soft is not None:
        kept = _beside(kept, pa.concat_tables(fitting(soft, [*KEPT_COLUMNS, "distributions"])))

    prompts = Spool(_schema(CHARGED, CHARGED_COLUMNS))
    if max_new_tokens:
        left_out.update(prompts_too_long=0, prompts_of_validation=0)
        for asked in _first_of_each(_batches(store, inputs, "charged", CHARGED_COLUMNS)):
            room = pc.less_equal(pc.list_value_length(asked["prompt_token_ids"]), max_length - max_new_tokens)
            fit = asked.filter(room)
            held_out = _held_out(fit, seed, validation_share)
            left_out.update(prompts_too_long=_count(pc.invert(room)), prompts_of_validation=_count(held_out))
            prompts.write(fit.filter(pc.invert(held_out)))
    return Data(kept, validation, prompts.table(), dict(left_out))


def _schema(schema: pa.Schema, columns: list[str]) -> pa.Schema:
    return pa.schema([schema.field(name) for name in columns])


def _batches(store: Store, inputs: list[Manifest], table: str, columns: list[str]) -> Iterator[pa.Table]:
    return joined(part for manifest in inputs for part in read_table(store, manifest, table, columns))


def _beside(kept: pa.Table, soft: pa.Table) -> pa.Table:
    """Rows with a mentor's behind them; column ``soft`` tells them apart."""
    if "distributions" not in kept.column_names:
        kept = kept.append_column("distributions", pa.nulls(kept.num_rows, pa.binary()))
    return pa.concat_tables(
        table.append_column("soft", pa.repeat(flag, table.num_rows)) for flag, table in ((False, kept), (True, soft))
    )


def _count(mask: pa.BooleanArray) -> int:
    return pc.sum(mask).as_py() or 0


def _held_out(table: pa.Table, seed: int, share: float) -> pa.BooleanArray:
    ids = table["prompt_id"].to_pylist()
    return pa.array([chance(seed, "validation", prompt_id) < share for prompt_id in ids], pa.bool_())


def _first_of_each(batches: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The rows of prompts that did not come up before. In memory are 64 bits of each, as many as ids have."""
    seen_M = np.empty(0, np.uint64)
    for prompts in batches:
        ids = prompts["prompt_id"].to_pylist()
        hashes = b"".join(hashlib.blake2b(prompt_id.encode(), digest_size=8).digest() for prompt_id in ids)
        keys_N, first_N = np.unique(np.frombuffer(hashes, np.uint64), return_index=True)
        at_N = np.searchsorted(seen_M, keys_N)
        new_N = np.searchsorted(seen_M, keys_N, "right") == at_N
        seen_M = np.insert(seen_M, at_N[new_N], keys_N[new_N])
        yield prompts.take(np.sort(first_N[new_N]))

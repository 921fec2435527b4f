"""The pool: rollouts that are trained on more than once, on every worker the same, and a part of the checkpoint.

Shape legend: M sequences, K values of a token, T response positions.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tasks.batches import Sequence
from tasks.student import World

POOL = pa.schema(
    [
        ("name", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int64())),
        ("token_ids", pa.list_(pa.int64())),
        # Null where the method has no use for them: log-probability by the law that drew the token, and its advantage.
        ("drawn_with", pa.list_(pa.float32())),
        ("advantages", pa.list_(pa.float32())),
    ]
)


def everyone(world: World, mine: list[Tensor], count: int, longest: int) -> list[Tensor]:
    """What all workers made of ``count`` sequences that were dealt out in turns: float64 [K, T] each, T at most
    ``longest``. ``mine`` are this worker's, on the CPU. Collective."""
    if not count:
        return []
    # A worker may have made none; all must know K.
    values = int(world.max(max((len(values_KT) for values_KT in mine), default=0)))
    padded_MKT = torch.zeros(count, values, longest, dtype=torch.float64)
    lengths_M = torch.zeros(count, dtype=torch.float64)
    for place, values_KT in zip(range(world.rank, count, world.size), mine, strict=True):
        lengths_M[place] = values_KT.shape[1]
        padded_MKT[place, :, : values_KT.shape[1]] = values_KT
    # Others' places hold zeros, so the sum leaves every number as it is.
    lengths = world.sum(lengths_M).long().tolist()
    return [values_KT[:, :length] for values_KT, length in zip(world.sum(padded_MKT), lengths, strict=True)]


def save_pool(path: Path, pool: list[Sequence]) -> None:
    rows = []
    for sequence in pool:
        tokens = {"prompt_token_ids": sequence.prompt.tolist(), "token_ids": sequence.response.tolist()}
        rows.append({"name": sequence.name, **tokens})
        if sequence.drawn_2T is not None:
            rows[-1]["drawn_with"], rows[-1]["advantages"] = sequence.drawn_2T.tolist()
    pq.write_table(pa.Table.from_pylist(rows, POOL), path)


def load_pool(path: Path) -> list[Sequence]:
    pool = []
    for row in pq.read_table(path, schema=POOL).to_pylist():
        prompt, response = torch.tensor(row["prompt_token_ids"]), torch.tensor(row["token_ids"])
        drawn_2T = None if row["drawn_with"] is None else torch.tensor([row["drawn_with"], row["advantages"]])
        pool.append(Sequence(row["name"], prompt, response, on_policy=True, drawn_2T=drawn_2T))
    return pool

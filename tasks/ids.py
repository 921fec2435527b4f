"""Ids of many rows in little memory: sorted bytes, 20 an id, where a set or a dictionary of Python takes 150.

Shape legend: N ids that are known, M ids that are looked up.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def as_bytes(column: pa.Array | pa.ChunkedArray) -> NDArray[np.bytes_]:
    """A column of ids as bytes of one width. Ids are ASCII and not null."""
    return column.to_numpy(zero_copy_only=False).astype("S")


class Ids:
    """The ids of several columns, and which of them each stands in."""

    def __init__(self, columns: Iterable[pa.Array | pa.ChunkedArray]) -> None:
        parts = [as_bytes(column) for column in columns]
        numbers_N = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
        ids_N = np.concatenate([np.empty(0, "S1"), *parts])
        order_N = np.argsort(ids_N)
        self.ids_N, self.numbers_N = ids_N[order_N], numbers_N[order_N]

    def find(self, column: pa.Array | pa.ChunkedArray) -> NDArray[np.int32]:
        """Of each id [M] the number of the column it stands in, from 0; -1 where it stands in none."""
        ids_M = as_bytes(column)
        at_M = np.searchsorted(self.ids_N, ids_M)
        known_M = np.searchsorted(self.ids_N, ids_M, "right") > at_M
        found_M = np.full(len(ids_M), -1, np.int32)
        found_M[known_M] = self.numbers_N[at_M[known_M]]
        return found_M

"""Ids are found in the column they stand in, whatever their length, in a fraction of a dictionary's memory."""

import tracemalloc

import numpy as np
import pyarrow as pa

from tasks.ids import Ids


def test_ids_are_found_where_they_stand() -> None:
    columns = [["b", "a"], [], ["0123456789abcdef", "c"], ["a longer one than the others"]]
    known = Ids(pa.array(column, pa.string()) for column in columns)
    asked = pa.chunked_array([["c", "0123456789abcdeg", "a"], ["", "a longer one than the others", "b", "aa"]])
    assert known.find(asked).tolist() == [2, -1, 0, -1, 3, 0, -1]
    assert known.find(pa.array([], pa.string())).tolist() == []
    for nothing in (Ids([]), Ids([pa.array([], pa.string())])):
        assert nothing.find(asked).tolist() == [-1] * 7


def test_an_id_takes_twenty_bytes() -> None:
    drawn = np.random.default_rng(0).bytes(8 * 50_000).hex()
    column = pa.array([drawn[start : start + 16] for start in range(0, len(drawn), 16)])
    tracemalloc.start()
    try:
        known = Ids(column.slice(start, 5000) for start in range(0, len(column), 5000))
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held < 21 * len(column)
    assert (known.find(column) == np.repeat(np.arange(10), 5000)).all()

"""The ranking: which candidates are worth a query, and which of them a budget covers.

Candidates stand in a duckdb database on this machine's disk (in the folder for temporary files, which TMPDIR names),
and every step is a query that spills: they need not fit in memory. Used by ``python -m tasks.select``.
"""

import hashlib
import math
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import duckdb
import numpy as np
import pyarrow as pa

from tasks.config.signals import Select
from tasks.dedupe import insert

SELECTED, EXHAUSTED, CAPPED, BALANCED = "selected", "budget_exhausted", "source_cap", "balance"
# Of duckdb: enough for 2·10⁷ candidates, who spill (64 MiB were not). A second thread needs as much again.
MEMORY = "128MiB"
# Self-consistency by its measure: what makes more of it doubt.
MEASURES = {"unique": "unique_answers", "majority": "-majority_share", "entropy": "entropy"}
# The order of choice: draws break ties.
ORDER = "uncertainty DESC, draw, n"


def draw(seed: int, prompt_id: str) -> int:
    """A prompt's random number: 63 bits, the same in every run of this seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}\x1fselect\x1f{prompt_id}".encode()).digest()[:8], "big") >> 1


def deciding_columns(select: Select) -> list[str]:
    """What is read of a candidate: no more, as it is written down for all."""
    measure = MEASURES[select.consistency].removeprefix("-")
    return list(dict.fromkeys(["prompt_id", "source", "unique_answers", measure, "ta_student", "correct"]))


def numbered(parts: Iterable[pa.Table], seed: int) -> Iterator[pa.Table]:
    """Candidates with their number and their draw in place of their id."""
    start = 0
    for rows in parts:
        draws = [draw(seed, prompt_id) for prompt_id in rows["prompt_id"].to_pylist()]
        columns = rows.drop_columns(["prompt_id"]).append_column("draw", pa.array(draws, pa.int64()))
        yield columns.append_column("n", pa.array(np.arange(start, start + rows.num_rows)))
        start += rows.num_rows


class Ranking:
    """Table ``candidates`` has what was given, numbered ``n`` in its order; ``fates``, once ``decide`` was called, each
    one's ``uncertainty`` and ``reason``."""

    def __init__(self, db: duckdb.DuckDBPyConnection) -> None:
        self.db = db
        self.candidates: int = self.one("SELECT count(*) FROM candidates")

    def one(self, query: str) -> int:
        """The only value of a query's only row; 0 for null."""
        return self.db.execute(query).fetchall()[0][0] or 0

    def _share(self, value: str) -> str:
        """Ranks of a column, scaled to 0 (smallest) … 1 (largest); equal values share the mean of their ranks, and all
        equal values are 0.5."""
        if self.candidates == 1:
            return "0.5::DOUBLE"
        twice = f"2 * rank() OVER (ORDER BY {value}) + count(*) OVER (PARTITION BY {value}) - 3"
        return f"({twice}) / {2.0 * (self.candidates - 1)!r}::DOUBLE"

    def _uncertainty(self, select: Select) -> str:
        """0 (certain) to 1: the rank average of the signals (the weighted mean of their ranks' shares); random
        selection has none and gives 0.5 to all; the oracle knows what is wrong (1), right (0) and unknown (0.5)."""
        if select.rule == "random":
            return "0.5::DOUBLE"
        if select.rule == "oracle":
            return "CASE WHEN correct IS NULL THEN 0.5 WHEN correct THEN 0.0 ELSE 1.0 END::DOUBLE"
        # An answer that the TA's engine died of is not worth a query: no doubt in it.
        doubts = {
            MEASURES[select.consistency]: select.consistency_weight,
            "1::FLOAT - coalesce(ta_student, 1)": select.assistant_weight,
        }
        terms = [f"{self._share(value)} * {weight!r}::DOUBLE" for value, weight in doubts.items() if weight]
        return f"least(({' + '.join(terms)}) / {sum(doubts.values())!r}::DOUBLE, 1.0::DOUBLE)"

    def _last(self, count: int, rows: str) -> int:
        """The turn of the last of so many rows of ``placed``; that of the last candidate where there are fewer."""
        if not count:
            return 0
        numbered = f"""
            SELECT turn, row_number() OVER (ORDER BY turn) AS number FROM placed JOIN quotas USING (source) WHERE {rows}
        """  # noqa: S608 (our own names, and numbers)
        return self.one(f"SELECT coalesce(max(turn), {self.candidates}) FROM ({numbered}) WHERE number = {count}")  # noqa: S608

    def decide(self, select: Select, queries: int) -> None:
        """Give every candidate its uncertainty, and the reason for which it is selected or is not.

        The most uncertain are selected, as many as there are queries. No source takes more than ``source_share`` of
        these. ``balance`` moves each source's guaranteed places from its share of the candidates (0: none) to an equal
        share (1), as BalDistill does for long-tailed tasks; places that a source cannot fill go to the ranking.

        Reasons are told by the ranking without guarantees: what stands behind its last query is ``budget_exhausted``;
        before it ``source_cap`` was passed over, behind as many of its source as that may have, and ``balance`` lost
        its query to a guaranteed place.
        """
        cap, balance = math.ceil(select.source_share * queries), select.balance
        natural = f"{1 - balance!r}::DOUBLE * count(*) / {self.candidates}"
        uniform = f"{balance!r}::DOUBLE / (SELECT count(DISTINCT source) FROM candidates)"  # noqa: S608
        guaranteed = f"least({cap}, trunc({queries} * ({natural} + {uniform})))" if balance else "0"
        self.db.execute(f"""
            CREATE OR REPLACE TABLE doubted AS
                SELECT n, source, draw, {self._uncertainty(select)} AS uncertainty FROM candidates;
            CREATE OR REPLACE TABLE ranked AS
                SELECT n, source, uncertainty, row_number() OVER (ORDER BY {ORDER}) AS turn FROM doubted;
            CREATE OR REPLACE TABLE placed AS
                SELECT *, row_number() OVER (PARTITION BY source ORDER BY turn) - 1 AS place FROM ranked;
            CREATE OR REPLACE TABLE quotas AS
                SELECT source, count(*) AS size, {guaranteed} AS guaranteed FROM candidates GROUP BY source;
        """)  # noqa: S608 (our own names, and numbers)
        left = queries - int(self.one("SELECT sum(least(guaranteed, size)) FROM quotas"))
        plain = self._last(queries, f"place < {cap}")
        free = self._last(left, f"place < {cap} AND place >= guaranteed")
        self.db.execute(f"""
            CREATE OR REPLACE TABLE fates AS
                SELECT n, uncertainty, CASE
                    WHEN place < guaranteed OR (place < {cap} AND turn <= {free}) THEN '{SELECTED}'
                    WHEN turn > {plain} THEN '{EXHAUSTED}'
                    WHEN place >= {cap} THEN '{CAPPED}'
                    ELSE '{BALANCED}' END AS reason
                FROM placed JOIN quotas USING (source) ORDER BY n;
            DROP TABLE doubted; DROP TABLE ranked; DROP TABLE placed;
        """)  # noqa: S608

    def fates(self, start: int, end: int) -> pa.Table:
        """What became of candidates ``start`` to ``end``, in their order."""
        query = "SELECT uncertainty, reason FROM fates WHERE n >= ? AND n < ? ORDER BY n"
        return self.db.execute(query, [start, end]).to_arrow_table()


@contextmanager
def ranking(parts: Iterable[pa.Table], schema: pa.Schema, seed: int) -> Iterator[Ranking]:
    """The ranking of the candidates in ``parts``, tables of ``schema``; ``seed`` decides between equals. What reading
    the parts raises comes through, such as DamagedError."""
    (empty,) = numbered([schema.empty_table()], seed)
    with tempfile.TemporaryDirectory(prefix="switchyard-ranking-") as folder:
        config: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": MEMORY,
            "threads": 1,
            "preserve_insertion_order": False,
            "temp_directory": folder,
        }
        with duckdb.connect(f"{folder}/candidates.duckdb", config=config) as db:
            db.from_arrow(empty).create("candidates")
            # By us and not by duckdb, which would make the reader's errors its own.
            for rows in numbered(parts, seed):
                insert(db, "candidates", rows)
            yield Ranking(db)

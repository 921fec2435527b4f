"""What makes two prompts one: equal normalised content, or nearly equal sets of word 3-grams.

The prompts stand in a duckdb database on disk, tables ``rows`` and ``fate`` (see ``tasks/prompts.py``), and every step
is a query that spills, or a pass of one batch at a time: the set need not fit in memory.

Near duplicates: MinHash signatures (datasketch) cut into bands; prompts that share a band with an earlier one are
compared with it by the exact Jaccard similarity of their 3-grams. Each band compares with its first prompt only, so
the work grows with the prompts, not with the pairs; a twin of a later prompt of the same band is still found by their
other bands. Likeness is taken as transitive: what is near to a refused twin is refused too.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

import duckdb
import pyarrow as pa
import xxhash

PERMUTATIONS = 128
# Bands are cut so that at most this share of the pairs at the threshold is missed.
MISSED = 0.01
BATCH_ROWS = 2048
BAND = pa.schema([("n", pa.int64()), ("band", pa.int16()), ("hash", pa.uint64())])
FATE = pa.schema([("n", pa.int64()), ("reason", pa.string())])
# Scripts without spaces between words: each sign counts as a word.
_WORDS = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|\w+|[^\w\s]")

Messages = list[dict[str, str]]


def normalised(text: str) -> str:
    """NFC, white space collapsed."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def content_hash(messages: Messages) -> str:
    """The prompt's id: 16 hex digits over the normalised conversation, system prompt included."""
    content = [[turn["role"], normalised(turn["content"])] for turn in messages]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]


def shingles(messages: Messages) -> frozenset[bytes]:
    """Word 3-grams of a conversation without its system prompt, which many prompts share. Case does not matter, numbers
    and punctuation do."""
    text = " ".join(turn["content"] for turn in messages if turn["role"] not in ("system", "developer"))
    words = _WORDS.findall(unicodedata.normalize("NFKC", text).casefold())
    return frozenset(" ".join(words[at : at + 3]).encode() for at in range(max(1, len(words) - 2)))


def jaccard(first: frozenset[bytes], second: frozenset[bytes]) -> float:
    """Shared 3-grams by all 3-grams."""
    return len(first & second) / len(first | second)


def batches(db: duckdb.DuckDBPyConnection, query: str, rows: int = BATCH_ROWS) -> Iterator[list[dict[str, Any]]]:
    """A query's rows, batch by batch."""
    for batch in db.cursor().execute(query).to_arrow_reader(rows):
        yield batch.to_pylist()


def insert(db: duckdb.DuckDBPyConnection, table: str, rows: pa.Table) -> None:
    """Append rows by column name."""
    db.register("batch", rows)
    db.execute(f"INSERT INTO {table} BY NAME SELECT * FROM batch")  # noqa: S608 (a table of ours)
    db.unregister("batch")


def drop_exact(db: duckdb.DuckDBPyConnection) -> None:
    """Of equal prompts the first stays. Held-out rows come first, so a training row that is held out goes."""
    db.execute("""
        INSERT INTO fate
        SELECT n, CASE WHEN NOT heldout AND first_heldout THEN 'in_heldout' ELSE 'duplicate' END
        FROM rows JOIN (
            SELECT prompt_id, min(n) AS first, bool_or(heldout) AS first_heldout FROM rows GROUP BY prompt_id
        ) USING (prompt_id)
        WHERE n <> first
    """)


def drop_near(db: duckdb.DuckDBPyConnection, threshold: float) -> None:
    """Of prompts at least ``threshold`` alike the first stays; held-out sources are left as they are."""
    width = band_width(threshold)
    db.execute("CREATE TABLE bands (n BIGINT, band SMALLINT, hash UBIGINT)")
    for batch in batches(db, "SELECT n, messages FROM rows ANTI JOIN fate USING (n)"):
        insert(db, "bands", band_rows(batch, width))
    db.execute("""
        CREATE TABLE pairs AS SELECT DISTINCT n, first
        FROM bands JOIN (SELECT band, hash, min(n) AS first FROM bands GROUP BY ALL HAVING count(*) > 1)
        USING (band, hash) WHERE n <> first
    """)
    db.execute("CREATE TABLE near (n BIGINT, reason VARCHAR)")
    query = """
        SELECT n, later.messages, earlier.messages AS earlier, earlier.heldout AS earlier_heldout
        FROM pairs JOIN rows AS later USING (n) JOIN rows AS earlier ON pairs.first = earlier.n
        WHERE NOT later.heldout
    """
    for batch in batches(db, query):
        found = [
            {"n": pair["n"], "reason": "in_heldout" if pair["earlier_heldout"] else "near_duplicate"}
            for pair in batch
            if jaccard(shingles(pair["messages"]), shingles(pair["earlier"])) >= threshold
        ]
        insert(db, "near", pa.Table.from_pylist(found, schema=FATE))
    # Near to a held-out prompt and to another: the graver reason, by luck the first of the alphabet, counts.
    db.execute("INSERT INTO fate SELECT n, min(reason) FROM near GROUP BY n")


def band_width(threshold: float) -> int:
    """Values of a signature that make a band: as many as bring together all but MISSED of the pairs at the threshold.
    Two signatures agree in each value with a probability equal to their Jaccard similarity."""
    return max(
        width
        for width in range(1, PERMUTATIONS + 1)
        if width == 1 or (1 - threshold**width) ** (PERMUTATIONS // width) <= MISSED
    )


def band_rows(batch: list[dict[str, Any]], width: int) -> pa.Table:
    """One row a prompt and band: the hash of that part of its signature."""
    # Imports scipy and a client of Redis: seconds, which most runs do without.
    from datasketch import MinHash

    signatures = MinHash.generator(
        (shingles(row["messages"]) for row in batch), num_perm=PERMUTATIONS, hashfunc=xxhash.xxh32_intdigest
    )
    rows = [
        {"n": row["n"], "band": band, "hash": xxhash.xxh64_intdigest(values[band * width :][:width].tobytes())}
        for row, values in zip(batch, (signature.hashvalues for signature in signatures), strict=True)
        for band in range(PERMUTATIONS // width)
    ]
    return pa.Table.from_pylist(rows, schema=BAND)

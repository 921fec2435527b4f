"""What earlier runs took: their prompts do not come again, and their held-out prompts are renewed by a share.

Rows stand in the prompts stage's duckdb database (see ``tasks/intake.py``). Used by ``python -m tasks.prompts``.
"""

from collections.abc import Iterator
from typing import Any

import duckdb

from infra.manifest import Manifest
from infra.parts import read_table
from infra.store import Store
from tasks.dedupe import insert
from tasks.intake import Intake
from tasks.rows import Row
from tasks.schemas import PROMPT

BATCH_ROWS = 1024


def keep_heldout(intake: Intake, store: Store, last: Manifest, wanted: int, salt: str) -> int:
    """Enter ``wanted`` of the last run's held-out prompts, drawn anew by ``salt``; how many there are now.

    They are the first rows of all, so whatever is equal or near to them is refused, as near to any held-out prompt.
    """
    rows = [row for part in read_table(store, last, "heldout") for row in part.to_pylist()]
    chosen = drawn(intake.db, [row["prompt_id"] for row in rows], wanted, salt)
    kept = [row for row in rows if row["prompt_id"] in chosen]
    for start in range(0, len(kept), BATCH_ROWS):
        intake.store([as_row(row) for row in kept[start : start + BATCH_ROWS]], heldout=True)
    return intake.done


def drawn(db: duckdb.DuckDBPyConnection, ids: list[str], wanted: int, salt: str) -> set[str]:
    """The ids with the smallest salted hashes."""
    query = "SELECT id FROM (SELECT unnest(?::VARCHAR[]) AS id) ORDER BY sha256(? || ' ' || id) LIMIT ?"
    return {row[0] for row in db.execute(query, [ids, salt, wanted]).fetchall()}


def as_row(row: dict[str, Any]) -> Row:
    """A committed prompt as its source would give it."""
    return Row(**{name: row[name] for name in PROMPT.names if name != "prompt_id"}, position=0)


def drop_taken(db: duckdb.DuckDBPyConnection, store: Store, earlier: list[Manifest]) -> int:
    """Remove rows to learn from that an earlier run took; how many they were. They are no refusals: they were used."""
    db.execute("CREATE TABLE taken (prompt_id VARCHAR)")
    for part in ids_of(store, earlier):
        insert(db, "taken", part)
    gone = "FROM rows WHERE NOT heldout AND prompt_id IN (SELECT prompt_id FROM taken)"
    counted = db.execute(f"SELECT count(*) {gone}").fetchone()
    db.execute(f"DELETE {gone}")
    return counted[0] if counted else 0


def ids_of(store: Store, earlier: list[Manifest]) -> Iterator[Any]:
    """Prompt ids of all that earlier runs learnt from or held out, part by part."""
    for manifest in earlier:
        for table in ("prompts", "heldout"):
            yield from read_table(store, manifest, table, ["prompt_id"])

"""Draws: which prompts are learnt from, which are held out, which the warm-up and the student's samples get.

Draws take the smallest salted hashes of the prompt ids, so they depend on the seed and on the prompts, not on their
order. Rows stand in the prompts stage's duckdb database (see ``tasks/intake.py``). Used by ``python -m tasks.prompts``.
"""

from typing import Any

import duckdb

from tasks.config.prompts import PromptsConfig


def count(db: duckdb.DuckDBPyConnection, query: str, *values: Any) -> int:
    row = db.execute(query, values).fetchone()
    assert row
    return row[0]


class TooFew(Exception):
    """New prompts that wait for more. The message says how many they are."""


def draw(
    db: duckdb.DuckDBPyConnection,
    config: PromptsConfig,
    *,
    seed: int,
    warmup: int,
    queries: int,
    candidates: int | None,
    kept: int = 0,
    least: int | None = None,
) -> None:
    """Every usable row becomes part of ``prompts`` or ``heldout``, or stays ``unused``; ``warmup`` is drawn of the
    prompts. The first ``kept`` rows are held out already. ValueError where there are too few; with ``least``,
    TooFew where fewer than that are left to learn from, and a smaller warm-up for fewer than the queries."""
    given = bool(config.heldout_sources)
    db.execute("CREATE TABLE usable AS SELECT n, prompt_id, heldout FROM rows ANTI JOIN fate USING (n)")
    learn, aside = (count(db, "SELECT count(*) FROM usable WHERE heldout = ?", flag) for flag in (False, True))
    fresh = config.heldout - count(db, "SELECT count(*) FROM usable WHERE n < ?", kept)
    if given and aside < config.heldout:
        raise ValueError(
            f"prompts.heldout: {config.heldout:,} asked for, but prompts.heldout_sources hold {aside:,} usable rows:"
            f" lower it to {aside:,} at most"
        )
    left = learn - (0 if given else fresh)
    if least and left < least:
        raise TooFew(f"{learn:,} new prompts, {fresh if not given else 0:,} of them to hold out")
    if left < 1:
        raise ValueError(
            f"prompts.heldout: {config.heldout:,} held-out prompts leave none of {learn:,} usable rows to learn from:"
            " lower it, or add data"
        )
    needed = max(warmup, queries)
    if least and needed > left:
        warmup = max(min(warmup, 1), left * warmup // needed)
    elif needed > left:
        raise ValueError(
            f"budget.queries: {needed:,} queries need as many prompts, but {left:,} are there: lower budget.queries to "
            f"{left:,} at most, or add data"
        )
    db.execute("CREATE TABLE parts AS SELECT n, 'heldout' AS part FROM usable WHERE n < ?", [kept])
    db.execute(
        "INSERT INTO parts SELECT n, 'heldout' FROM usable WHERE n >= ? AND heldout = ?"
        " ORDER BY sha256('heldout ' || ? || ' ' || prompt_id) LIMIT ?",
        [kept, given, str(seed), fresh],
    )
    db.execute(
        "INSERT INTO parts SELECT n, CASE WHEN heldout THEN 'unused' ELSE 'prompts' END"
        " FROM usable ANTI JOIN parts USING (n)"
    )
    db.execute(
        "CREATE TABLE warmup AS SELECT n FROM usable SEMI JOIN (FROM parts WHERE part = 'prompts') USING (n)"
        " ORDER BY sha256('warmup ' || ? || ' ' || prompt_id) LIMIT ?",
        [str(seed), warmup],
    )
    # A limit of NULL is none.
    db.execute(
        "CREATE TABLE candidates AS SELECT n FROM usable SEMI JOIN (FROM parts WHERE part = 'prompts') USING (n)"
        " ANTI JOIN warmup USING (n) ORDER BY sha256('candidates ' || ? || ' ' || prompt_id) LIMIT ?",
        [str(seed), candidates],
    )

"""Prompts: sources become problems to learn from, a warm-up draw of them, held-out problems, and refused rows.

    python -m tasks.prompts --spec SPEC.json

Input ``models`` (its facts hold the tokenizer's model). Tables ``prompts``, of them ``warmup`` and ``candidates``,
``heldout``, ``undrawn`` (usable rows in none of these three, with the reason) and ``quarantine``. The set need not fit
in memory: rows go to a duckdb database in the temporary folder (TMPDIR), Python holds a batch at a time.

Reasons of refusal: empty_prompt, too_long (in tokens, or a line beyond 8 MiB), undecodable, broken_line, malformed (a
value of the wrong type), missing_field, no_template (the chat template refuses the conversation), duplicate,
near_duplicate, in_heldout (a training row that is equal or near to a row of a held-out source).

Of runs that follow each other (``after``) each takes new prompts only; where these are too few the stage ends without
tables and with the fact ``waits``, and nothing counts as taken.
"""

import tempfile
from collections.abc import Iterator
from typing import Any

import duckdb
import pyarrow as pa
from pydantic import Field

from infra.models import ModelRef, load_tokenizer, local_folder
from tasks import schemas
from tasks.config.base import Config
from tasks.config.prompts import JsonlSource, ParquetSource, PromptsConfig
from tasks.dedupe import drop_exact, drop_near
from tasks.draws import TooFew, count, draw
from tasks.earlier import drop_taken, keep_heldout
from tasks.intake import Intake, Measure
from tasks.sources import identity
from tasks.stage import Stage, main
from tasks.verify import check_verifier

# A written part: about so many rows at most, or so many bytes.
PART_ROWS, PART_BYTES = 8192, 128 << 20
# What duckdb needs for its one thread, and how many vectors of prompts, of so many rows each, it may have in hand
# beside. A second thread would need as much again.
THREAD_BYTES, VECTORS, VECTOR_ROWS = 128 << 20, 8, 2048
TOKEN_BYTES = 4
# Sources of a run are few, but a ``source`` column may hold anything: so many are counted by name.
COUNTED_SOURCES = 100


class After(Config):
    """What a run takes over from the runs before it."""

    earlier: list[str] = Field(default_factory=list)
    """Inputs: the prompts stages of earlier runs, in order. What they took is not taken again."""
    renewal: float = Field(default=0.2, ge=0, le=1)
    """Share of the last one's held-out prompts that is replaced by new ones."""
    least: int = Field(ge=2)
    """New prompts to learn from: fewer wait. Fewer than the queries lower these, the warm-up's by its share."""


class PromptsSettings(Config):
    """What the stage does."""

    prompts: PromptsConfig
    """Sources, and what is refused."""
    identities: list[str] = Field(default_factory=list)
    """Contents of the sources (``tasks.sources.identity``): they enter the fingerprint, nothing else."""
    seed: int = 0
    """Seed of the draws."""
    warmup: int = Field(ge=0)
    """Prompts drawn for the warm-up: its share of budget.queries."""
    queries: int = Field(default=1, ge=1)
    """Teacher queries in all: there must be as many prompts."""
    candidates: int | None = Field(default=None, ge=1)
    """Prompts drawn, of those that are not in the warm-up, for the student's samples: all where absent."""
    tokenizer_key: str = "teacher"
    """Role of the model whose tokenizer counts tokens."""
    chat_template_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template."""
    after: After | None = None
    """For runs that follow each other; a run stands alone where absent."""


def write(
    stage: Stage[PromptsSettings], db: duckdb.DuckDBPyConnection, table: str, query: str, schema: pa.Schema
) -> None:
    """Commit a query's rows as the parts of a table."""
    done = stage.done(table)
    for shard, rows in enumerate(parts(db, query)):
        if shard not in done:
            stage.commit(table, shard, rows.select(schema.names).cast(schema))
    stage.close_table(table, schema)


def parts(db: duckdb.DuckDBPyConnection, query: str) -> Iterator[pa.Table]:
    """A query's rows in parts of bounded size."""
    reader = db.cursor().execute(query).to_arrow_reader(PART_ROWS // 4)
    held: list[pa.RecordBatch] = []
    for batch in reader:
        held.append(batch)
        if sum(b.num_rows for b in held) >= PART_ROWS or sum(b.nbytes for b in held) >= PART_BYTES:
            yield pa.Table.from_batches(held)
            held = []
    if held:
        yield pa.Table.from_batches(held)


def write_all(stage: Stage[PromptsSettings], db: duckdb.DuckDBPyConnection) -> None:
    chosen = "SELECT rows.* FROM rows SEMI JOIN ({}) AS chosen USING (n) ORDER BY n"
    members = {
        "prompts": "FROM parts WHERE part = 'prompts'",
        "warmup": "FROM warmup",
        "candidates": "FROM candidates",
        "heldout": "FROM parts WHERE part = 'heldout'",
    }
    for table, member in members.items():
        write(stage, db, table, chosen.format(member), schemas.PROMPT)
    query = """
        SELECT * FROM refused UNION ALL
        SELECT n, source, position, reason, left(array_to_string([m.content FOR m IN messages], chr(10)), 10000) AS raw
        FROM rows JOIN fate USING (n) ORDER BY n
    """
    write(stage, db, "quarantine", query, schemas.QUARANTINE)
    query = """
        SELECT prompt_id, source, position, CASE WHEN heldout THEN 'not_held_out' ELSE 'not_a_candidate' END AS reason
        FROM rows SEMI JOIN (FROM parts WHERE part IN ('prompts', 'unused')) AS usable USING (n)
        ANTI JOIN warmup USING (n) ANTI JOIN candidates USING (n) ORDER BY n
    """
    write(stage, db, "undrawn", query, schemas.UNDRAWN)


def facts(db: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """Counts of all that was read and what became of it, and the prompts' length in tokens."""
    db.execute("""
        CREATE VIEW outcomes AS
        SELECT source, reason AS outcome, true AS refused FROM refused UNION ALL
        SELECT source, reason, true FROM rows JOIN fate USING (n) UNION ALL
        SELECT source, part, false FROM rows JOIN parts USING (n)
    """)
    by_part = dict(db.execute("SELECT part, count(*) FROM parts GROUP BY ALL").fetchall())
    by_reason = db.execute("SELECT outcome, count(*) FROM outcomes WHERE refused GROUP BY ALL ORDER BY 2 DESC, 1")
    reasons = dict(by_reason.fetchall())
    by_source = db.execute(
        """
        SELECT source, count(*) AS read, count(*) FILTER (outcome = 'prompts') AS prompts,
               count(*) FILTER (outcome = 'heldout') AS heldout, count(*) FILTER (refused) AS refused
        FROM outcomes GROUP BY source ORDER BY read DESC, source LIMIT ?
    """,
        [COUNTED_SOURCES],
    )
    sources = {row["source"]: row for row in by_source.to_arrow_table().to_pylist()}
    mean, most = db.execute("SELECT avg(tokens), max(tokens) FROM rows SEMI JOIN parts USING (n)").fetchone() or (0, 0)
    return {
        "counts": {
            "read": sum(by_part.values()) + sum(reasons.values()),
            "prompts": by_part.get("prompts", 0),
            "warmup": count(db, "SELECT count(*) FROM warmup"),
            "candidates": count(db, "SELECT count(*) FROM candidates"),
            "heldout": by_part.get("heldout", 0),
            "heldout_unused": by_part.get("unused", 0),
            "reasons": reasons,
            "sources": {name: {key: row[key] for key in row if key != "source"} for name, row in sources.items()},
        },
        "prompt_tokens": {"mean": round(mean, 1), "max": most},
    }


def measure(stage: Stage[PromptsSettings]) -> Measure:
    """The tokenizer that counts. ValueError where it has no chat template."""
    settings = stage.settings
    model = ModelRef.model_validate(stage.input("models").facts["models"][settings.tokenizer_key])
    tokenizer = load_tokenizer(local_folder(stage.store, model, weights=False), model.chat_template)
    if not tokenizer.chat_template:
        raise ValueError(
            f"models.{settings.tokenizer_key}: its tokenizer has no chat template: set models.chat_template"
        )
    return Measure(tokenizer, settings.prompts.max_prompt_tokens, settings.chat_template_args)


def earlier(stage: Stage[PromptsSettings]) -> list[str]:
    return stage.settings.after.earlier if stage.settings.after else []


def continued(stage: Stage[PromptsSettings], intake: Intake) -> int:
    """Enter the share of the last run's held-out prompts that stays; how many they are."""
    after, names, heldout = stage.settings.after, earlier(stage), stage.settings.prompts.heldout
    if not after or not names:
        return 0
    salt = f"renewal {stage.settings.seed} {len(names)}"
    return keep_heldout(intake, stage.store, stage.input(names[-1]), heldout - round(after.renewal * heldout), salt)


def check_unchanged(settings: PromptsSettings) -> None:
    """ValueError where a file is not the one any more that the settings name."""
    sources = [*settings.prompts.sources, *settings.prompts.heldout_sources]
    for source, known in zip(sources, settings.identities, strict=False):
        if isinstance(source, JsonlSource | ParquetSource) and identity(source) != known:
            raise ValueError(f"{source.path!r} changed while the run began: run again")


def database(longest: int, folder: str) -> dict[str, Any]:
    """duckdb's settings for prompts of at most ``longest`` tokens: it takes what memory it may have, and spills."""
    memory = THREAD_BYTES + VECTORS * VECTOR_ROWS * TOKEN_BYTES * longest
    return {
        "memory_limit": f"{memory >> 20}MiB",
        "threads": 1,
        "preserve_insertion_order": False,
        "temp_directory": f"{folder}/spill",
    }


def run(stage: Stage[PromptsSettings]) -> None:
    config = stage.settings.prompts
    if config.verifier != "auto":
        check_verifier(config.verifier)
    with (
        tempfile.TemporaryDirectory(prefix="switchyard-prompts-") as folder,
        duckdb.connect(f"{folder}/rows.duckdb", config=database(config.max_prompt_tokens, folder)) as db,
    ):
        intake = Intake(db, config, measure(stage), lambda done, total: stage.progress(done, total, "rows"))
        kept = continued(stage, intake)
        intake.read_all()
        check_unchanged(stage.settings)
        taken = drop_taken(db, stage.store, [stage.input(name) for name in earlier(stage)])
        drop_exact(db)
        if config.near_duplicates.enabled:
            drop_near(db, config.near_duplicates.threshold)
        try:
            draw(
                db,
                config,
                seed=stage.settings.seed,
                warmup=stage.settings.warmup,
                queries=stage.settings.queries,
                candidates=stage.settings.candidates,
                kept=kept,
                least=stage.settings.after.least if stage.settings.after else None,
            )
            write_all(stage, db)
            stage.facts.update(facts(db), quarantined=stage.manifest.tables["quarantine"].rows)
            stage.facts["counts"] |= {"read": intake.done - kept, "taken_before": taken, "heldout_before": kept}
        except TooFew as few:
            stage.facts.update(waits=str(few), counts={"read": intake.done - kept, "taken_before": taken})
    stage.log.info("prompts: %s", stage.facts["counts"])
    stage.progress(intake.done, intake.done, "rows", last=True)


if __name__ == "__main__":
    main(PromptsSettings, run)

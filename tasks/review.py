"""Review: the answers of several teachers side by side, each scored by the other teachers (as in FAIR).

    python -m tasks.review --spec SPEC.json

Table ``samples`` has all answers, cut as the prompts are. Table ``reviews-<teacher>``, one a reviewer, has that
teacher's scores of the others' answers: the confidence that a TA would give. As with a TA that is the teacher, scoring
is no annotation query and not charged to the budget; how many scores were given stands in the facts.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from infra.manifest import Manifest
from infra.parts import read_part
from tasks import schemas
from tasks.config.base import Config
from tasks.config.signals import Confidence, PTrue
from tasks.engines import Call, EngineAccess, engines, model_of
from tasks.sample import slices
from tasks.score import as_confidence, confidence_call
from tasks.stage import Stage, main

TABLE = "reviews-"
# One shard: its number, of each answer the prompt and its author, and the answers.
Answers = tuple[int, list[dict[str, Any]], list[str], pa.Table]


class ReviewSettings(Config):
    """Whose answers, and who reviews them."""

    table: str
    """Table of the input ``prompts`` that was answered."""
    shard_size: int
    """The sampling stages': prompts and samples are read side by side."""
    samples: dict[str, str] = Field(min_length=1)
    """Inputs with samples by teacher."""
    reviewers: list[str] = Field(default_factory=list)
    """Teachers that score the others' answers."""
    confidence: Confidence = PTrue()
    """How their confidence is read."""
    template_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template."""


def shards(stage: Stage[ReviewSettings]) -> Iterator[Answers]:
    """All answers, shard by shard, teacher by teacher."""
    settings = stage.settings
    parts = {teacher: stage.input(name).tables["samples"].by_shard for teacher, name in settings.samples.items()}
    for shard, prompts in slices(stage, "prompts", settings.table, settings.shard_size):
        tables = {teacher: read_part(stage.store, own[shard]) for teacher, own in parts.items()}
        authors = [teacher for teacher, table in tables.items() for _ in range(table.num_rows)]
        by_id = {row["prompt_id"]: row for row in prompts.to_pylist()}
        answers = pa.concat_tables(tables.values())
        yield shard, [by_id[prompt_id] for prompt_id in answers["prompt_id"].to_pylist()], authors, answers


def review(stage: Stage[ReviewSettings], access: EngineAccess, reviewer: str) -> None:
    """Commit one teacher's scores of what the others wrote."""
    settings, table = stage.settings, TABLE + reviewer
    model, done = model_of(stage, "models", reviewer), stage.done(table)

    def calls() -> Iterator[tuple[tuple[int, pa.Table], Call]]:
        for shard, prompts, authors, answers in shards(stage):
            if shard in done:
                continue
            others = [number for number, author in enumerate(authors) if author != reviewer]
            rows = answers.select(["sample_id", "prompt_id"]).take(pa.array(others, pa.int64()))
            rows = rows.append_column("teacher", pa.array([authors[number] for number in others], pa.string()))
            if not others:
                stage.commit(table, shard, schemas.REVIEW.empty_table())
                continue
            conversations = [prompts[number]["messages"] for number in others]
            texts = answers["text"].take(pa.array(others, pa.int64())).to_pylist()
            yield (
                (shard, rows),
                confidence_call(settings.confidence, model, conversations, texts, settings.template_args),
            )

    total = sum(stage.input(name).tables["samples"].rows for own, name in settings.samples.items() if own != reviewer)
    scored = sum(part.rows for part in done.values())
    stage.progress(scored, total, "answers", now=reviewer)
    for (shard, rows), result in access.pool(reviewer, model).map(calls()):
        scores = pa.array(as_confidence(settings.confidence, result), pa.float32())
        columns = {
            **{name: rows[name] for name in rows.column_names},
            "reviewer": [reviewer] * rows.num_rows,
            # Of what its engine died it has no opinion.
            "score": pc.if_else(pc.is_nan(scores), None, scores),
        }
        stage.commit(table, shard, pa.table(columns, schema=schemas.REVIEW))
        scored += rows.num_rows
        stage.progress(scored, total, "answers", now=reviewer)


def mean_scores(store: Any, manifest: Manifest, shard: int) -> dict[str, float]:
    """By sample id the mean of what its reviewers gave, in one shard; none where nobody could say."""
    given: dict[str, list[float]] = {}
    for name, table in manifest.tables.items():
        if name.startswith(TABLE) and shard in table.by_shard:
            for row in read_part(store, table.by_shard[shard], ["sample_id", "score"]).to_pylist():
                if row["score"] is not None:
                    given.setdefault(row["sample_id"], []).append(row["score"])
    return {name: float(np.mean(scores)) for name, scores in given.items()}


def run(stage: Stage[ReviewSettings]) -> None:
    settings, done = stage.settings, stage.done("samples")
    for shard, _, _, answers in shards(stage):
        if shard not in done:
            stage.commit("samples", shard, answers)
    stage.close_table("samples", schemas.SAMPLE)
    by_teacher = {teacher: stage.input(name).tables["samples"].rows for teacher, name in settings.samples.items()}
    if not sum(by_teacher.values()):
        raise ValueError(f"budget: it covers not one prompt of {settings.table}: raise it")
    if settings.reviewers:
        with engines(stage) as access:
            for reviewer in settings.reviewers:
                review(stage, access, reviewer)
    for reviewer in settings.reviewers:
        stage.close_table(TABLE + reviewer, schemas.REVIEW)
    reviews = {name: stage.manifest.tables[TABLE + name] for name in settings.reviewers}
    stage.facts.update(
        answers=by_teacher,
        reviews={name: table.rows for name, table in reviews.items()},
        mean_score_of=mean_by_teacher(stage),
    )


def mean_by_teacher(stage: Stage[ReviewSettings]) -> dict[str, float | None]:
    """What each teacher's answers were given by the others, on average."""
    sums: dict[str, list[float]] = {}
    for reviewer in stage.settings.reviewers:
        for part in stage.manifest.tables[TABLE + reviewer].parts:
            rows = read_part(stage.store, part, ["teacher", "score"])
            for row in rows.group_by("teacher").aggregate([("score", "sum"), ("score", "count")]).to_pylist():
                known = sums.setdefault(row["teacher"], [0.0, 0.0])
                known[0] += row["score_sum"] or 0.0
                known[1] += row["score_count"]
    return {name: total / count if count else None for name, (total, count) in sums.items()}


if __name__ == "__main__":
    main(ReviewSettings, run)

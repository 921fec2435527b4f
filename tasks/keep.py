"""Keeping: the TA scores each teacher annotation, and a rule decides which enter the training set.

    python -m tasks.keep --spec SPEC.json

Every annotation stays in ``scores`` with its confidence and the reason it was kept or dropped. The confidence may be
calibrated first (``tasks/calibrate.py``), the TA's own answer may have to agree (``tasks/agreement.py``), and the
student's text may stand in (``tasks/stand_in.py``, from inputs ``select`` and ``student-sample``).
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from infra.parts import read_part
from tasks import agreement, schemas
from tasks.calibrate import Fit, fitted
from tasks.config.base import Config
from tasks.config.signals import Confidence, Keep, PTrue
from tasks.engines import Call, engines, model_of
from tasks.foreign import InStudentTokens
from tasks.keeping import choose, join, judged, replaced, threshold
from tasks.review import mean_scores
from tasks.sample import slices
from tasks.score import as_confidence, confidence_call
from tasks.stage import Stage, main
from tasks.stand_in import OwnAnswers

CONFIDENCE = pa.schema([("sample_id", pa.string()), ("confidence", pa.float32())])


class KeepSettings(Config):
    """How annotations are scored and filtered."""

    table: str
    """Table of the input ``prompts`` that the input ``samples`` answered."""
    shard_size: int
    """The sampling stage's: prompts and samples are read side by side."""
    confidence: Confidence = PTrue()
    """How the TA's confidence is read."""
    keep: Keep = Keep()
    """The rule."""
    same_text: float = 50.0
    """ROUGE-L from which on two free texts are one answer, for a majority and for a stand-in."""
    template_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template."""
    peer_review: float | None = None
    """Least mean score by the other teachers (tables of ``tasks.review`` beside the samples); none where absent."""
    charges: bool = True
    """Whether the samples were charged to the budget: rollouts start from charged prompts only."""
    validation_share: float = 0.0
    """Which prompts no training learns from, where the confidence is calibrated."""
    drop_calibrating: bool = False
    """Whether rows that calibrate are dropped, as no training leaves them out by itself."""
    seed: int = 0
    """Seed of the run: which prompts are validation."""


def pairs(stage: Stage[KeepSettings]) -> Iterator[tuple[int, list[dict[str, Any]], pa.Table]]:
    """(shard, one prompt row per sample, samples), shard by shard; both sides were cut alike."""
    parts = stage.input("samples").tables["samples"].by_shard
    for shard, prompts in slices(stage, "prompts", stage.settings.table, stage.settings.shard_size):
        samples = with_distributions(stage, shard, read_part(stage.store, parts[shard]))
        by_id = {row["prompt_id"]: row for row in prompts.to_pylist()}
        yield shard, [by_id[prompt_id] for prompt_id in samples["prompt_id"].to_pylist()], samples


def with_distributions(stage: Stage[KeepSettings], shard: int, samples: pa.Table) -> pa.Table:
    """The samples of a shard with the teacher's distributions as a column, null where they were not asked for."""
    table = stage.input("samples").tables.get("distributions")
    if table is None:
        return samples.append_column("distributions", pa.nulls(samples.num_rows, pa.binary()))
    rows = read_part(stage.store, table.by_shard[shard]).to_pylist()
    blobs = {row["sample_id"]: row["distributions"] for row in rows}
    column = pa.array([blobs[name] for name in samples["sample_id"].to_pylist()], pa.binary())
    return samples.append_column("distributions", column)


def score(stage: Stage[KeepSettings]) -> None:
    """Commit the TA's confidence in every sample, and its own answers where these have to agree."""
    settings = stage.settings
    done = stage.done("confidence")
    shards = stage.input("samples").tables["samples"].parts
    assistant = model_of(stage, "models", "assistant")

    def calls() -> Iterator[tuple[tuple[int, pa.Table], Call]]:
        for shard, prompts, samples in pairs(stage):
            if shard not in done and not samples.num_rows:
                # The budget did not reach it.
                stage.commit("confidence", shard, CONFIDENCE.empty_table())
            elif shard not in done:
                conversations = [prompt["messages"] for prompt in prompts]
                texts = samples["text"].to_pylist()
                yield (
                    (shard, samples),
                    confidence_call(settings.confidence, assistant, conversations, texts, settings.template_args),
                )

    rows_done = sum(part.rows for part in done.values())
    total = sum(part.rows for part in shards)
    stage.progress(rows_done, total, "answers")
    agrees = settings.keep.agreement
    if len(done) < len(shards) or (agrees and len(stage.done(agreement.TABLE)) < len(shards)):
        with engines(stage) as access:
            pool = access.pool("assistant", assistant)
            for (shard, samples), values in pool.map(calls()):
                confidences = as_confidence(settings.confidence, values)
                stage.commit(
                    "confidence",
                    shard,
                    pa.table({"sample_id": samples["sample_id"], "confidence": confidences}, schema=CONFIDENCE),
                )
                rows_done += samples.num_rows
                stage.progress(rows_done, total, "answers")
            if agrees:
                asked = ((shard, prompts) for shard, prompts, _ in pairs(stage))
                agreement.ask(stage, pool, assistant, agrees, asked, len(shards), settings.template_args)
    stage.close_table("confidence", CONFIDENCE)
    if agrees:
        stage.close_table(agreement.TABLE, agreement.ANSWER)


def doubts(stage: Stage[KeepSettings], shard: int, samples: pa.Table) -> set[str]:
    """Ids of a shard's samples that the other teachers' mean score is too low for, or that none of them could score."""
    least = stage.settings.peer_review
    if least is None:
        return set()
    scores = mean_scores(stage.store, stage.input("samples"), shard)
    return {name for name in samples["sample_id"].to_pylist() if scores.get(name, -1.0) < least}


def filter_shard(
    stage: Stage[KeepSettings],
    shard: int,
    prompts: list[dict[str, Any]],
    samples: pa.Table,
    confidences: np.ndarray,
    fit: Fit | None,
    least: float,
    own: OwnAnswers | None,
    readable: InStudentTokens,
) -> None:
    """Commit one shard's scores, kept rows and charged prompts."""
    keep, same_text = stage.settings.keep, stage.settings.same_text
    rows = [readable.of(prompt, row) for prompt, row in zip(prompts, samples.to_pylist(), strict=True)]
    doubted = doubts(stage, shard, samples)
    answers = agreement.answers_of(stage, shard) if keep.agreement else {}
    deciding = (fit.map(confidences) if fit else confidences).tolist()
    scores = [
        judged(keep, least, prompt, sample, confidence, answers)
        | {
            "ta_teacher": None if math.isnan(raw) else raw,
            "calibrated": confidence if fit and not math.isnan(raw) else None,
            "calibrates": sample["sample_id"] in fit.seen if fit else None,
        }
        for prompt, sample, raw, confidence in zip(prompts, rows, confidences.tolist(), deciding, strict=True)
    ]
    for row in scores:
        if row["kept"] and row["sample_id"] in doubted:
            row |= {"kept": False, "reason": "peer_review"}
        if row["kept"] and row["calibrates"] and stage.settings.drop_calibrating:
            row |= {"kept": False, "reason": "calibrates"}
    by_id = {prompt["prompt_id"]: prompt for prompt in prompts}
    theirs: dict[str, list[dict[str, Any]]] = {prompt_id: [] for prompt_id in by_id}
    for row in scores:
        theirs[row["prompt_id"]].append(row)
    if keep.compares:
        for prompt_id, prompt in by_id.items():
            join(prompt, theirs[prompt_id], same_text)
    if keep.answers != "all":
        choose(keep, scores, deciding)
    charged = {
        sample["prompt_id"]: {
            "prompt_id": sample["prompt_id"],
            "source": prompt["source"],
            "prompt_token_ids": sample["prompt_token_ids"],
        }
        for prompt, sample in zip(prompts, rows, strict=True)
        if stage.settings.charges
    }
    if own and keep.stand_in:
        for prompt_id, found in own.of(charged).items():
            confidence = float(fit.map(np.array([found.confidence]))[0]) if fit else found.confidence
            prompt = by_id[prompt_id]
            row = judged(keep, least, prompt, found.sample, confidence, answers)
            join(prompt, [*theirs[prompt_id], row], same_text)
            if replaced(keep.stand_in, scores, deciding, row, confidence):
                scores.append(row | {"reason": "stand_in"})
                rows.append(found.sample)
                deciding.append(confidence)
    kept = [
        {
            **{name: row[name] for name in ("sample_id", "prompt_id", "source")},
            **{name: sample[name] for name in ("prompt_token_ids", "token_ids", "distributions")},
            "row_id": sample["sample_id"],
            "weight": confidence if keep.rule == "weight" else 1.0,
        }
        for row, sample, confidence in zip(scores, rows, deciding, strict=True)
        if row["kept"]
    ]
    stage.commit("scores", shard, pa.Table.from_pylist(scores, schema=schemas.SCORE))
    stage.commit("kept", shard, pa.Table.from_pylist(kept, schema=schemas.KEPT))
    stage.commit("charged", shard, pa.Table.from_pylist(list(charged.values()), schema=schemas.CHARGED))


def run(stage: Stage[KeepSettings]) -> None:
    score(stage)
    scored, keep, fit = stage.manifest.tables["confidence"], stage.settings.keep, None

    def confidences_of(shard: int) -> np.ndarray:
        return read_part(stage.store, scored.by_shard[shard], ["confidence"])["confidence"].to_numpy()

    if keep.calibrate:
        settings = stage.settings
        fit, known = fitted(pairs(stage), confidences_of, keep.calibrate, settings.seed, settings.validation_share)
        stage.facts["calibration"] = {"known": known, "used": fit is not None}
    least = threshold(keep, lambda: map(confidences_of, scored.by_shard), fit.map if fit else None)
    own = OwnAnswers(stage) if keep.stand_in else None
    readable = InStudentTokens(stage, stage.settings.template_args)
    for shard, prompts, samples in pairs(stage):
        filter_shard(stage, shard, prompts, samples, confidences_of(shard), fit, least, own, readable)
    for table, schema in (("scores", schemas.SCORE), ("kept", schemas.KEPT), ("charged", schemas.CHARGED)):
        stage.close_table(table, schema)
    why = reasons(stage)
    stage.facts.update(
        threshold=least,
        scored=scored.rows,
        kept=stage.manifest.tables["kept"].rows,
        reasons=why,
    )
    if keep.stand_in:
        stage.facts["stand_ins"] = why.get("stand_in", 0)
    if not stage.facts["kept"]:
        fix = "lower it" + (", or leave signals.keep.agreement out" if keep.agreement else "")
        raise ValueError(
            f"signals.keep.threshold: {keep.threshold} ({keep.rule}) kept none of {stage.facts['scored']} annotations "
            f"({why}): {fix}"
        )


def reasons(stage: Stage[Any]) -> dict[str, int]:
    """Rows by reason."""
    counts: dict[str, int] = {}
    for part in stage.manifest.tables["scores"].parts:
        for entry in pc.value_counts(read_part(stage.store, part, ["reason"])["reason"]).to_pylist():
            counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
    return counts


if __name__ == "__main__":
    main(KeepSettings, run)

"""Keeping: the TA scores each teacher annotation, and a rule decides which enter the training set.

    python -m tasks.keep --spec SPEC.json

Every annotation stays in ``scores`` with its confidence and the reason it was kept or dropped. The confidence may be
calibrated first (``tasks/calibrate.py``).
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from infra.manifest import read_part
from kernels.consistency import consistency
from tasks import schemas
from tasks.calibrate import Fit, fitted
from tasks.config.base import Config
from tasks.config.signals import Confidence, Keep, PTrue
from tasks.engines import Call, engines, model_of
from tasks.review import mean_scores
from tasks.sample import slices
from tasks.score import as_confidence, confidence_call
from tasks.stage import Stage, main
from tasks.verify import final_answer, is_correct

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
    template_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template."""
    peer_review: float | None = None
    """Least mean score by the other teachers (tables of ``tasks.review`` beside the samples); none where absent."""
    charges: bool = True
    """Whether the samples were charged to the budget: rollouts start from charged prompts only."""
    validation_share: float = 0.0
    """Training's: which prompts are validation, where the confidence is calibrated."""
    seed: int = 0
    """Seed of the run: which prompts are validation."""


def pairs(stage: Stage[KeepSettings]) -> Iterator[tuple[int, list[dict[str, Any]], pa.Table]]:
    """(shard, one prompt row per sample, samples), shard by shard; both sides were cut alike."""
    parts = {part.shard: part for part in stage.input("samples").tables["samples"].parts}
    for shard, prompts in slices(stage, "prompts", stage.settings.table, stage.settings.shard_size):
        samples = with_distributions(stage, shard, read_part(stage.store, parts[shard]))
        by_id = {row["prompt_id"]: row for row in prompts.to_pylist()}
        yield shard, [by_id[prompt_id] for prompt_id in samples["prompt_id"].to_pylist()], samples


def with_distributions(stage: Stage[KeepSettings], shard: int, samples: pa.Table) -> pa.Table:
    """The samples of a shard with the teacher's distributions as a column, null where they were not asked for."""
    table = stage.input("samples").tables.get("distributions")
    if table is None:
        return samples.append_column("distributions", pa.nulls(samples.num_rows, pa.binary()))
    part = next(part for part in table.parts if part.shard == shard)
    blobs = {row["sample_id"]: row["distributions"] for row in read_part(stage.store, part).to_pylist()}
    column = pa.array([blobs[name] for name in samples["sample_id"].to_pylist()], pa.binary())
    return samples.append_column("distributions", column)


def score(stage: Stage[KeepSettings]) -> None:
    """Commit the TA's confidence in every sample."""
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
    if len(done) < len(shards):
        with engines(stage) as access:
            for (shard, samples), values in access.pool("assistant", assistant).map(calls()):
                confidences = as_confidence(settings.confidence, values)
                stage.commit(
                    "confidence",
                    shard,
                    pa.table({"sample_id": samples["sample_id"], "confidence": confidences}, schema=CONFIDENCE),
                )
                rows_done += samples.num_rows
                stage.progress(rows_done, total, "answers")
    stage.close_table("confidence", CONFIDENCE)


def threshold(keep: Keep, confidences: np.ndarray) -> float:
    """The confidence from which an annotation is kept."""
    if keep.rule == "absolute":
        return keep.threshold
    if keep.rule == "quantile" and not np.isnan(confidences).all():
        return float(np.nanquantile(confidences, keep.threshold))
    return 0.0


def reason(keep: Keep, least: float, sample: dict[str, Any], confidence: float) -> str:
    """Why one annotation is kept or dropped."""
    if not sample["text"].strip():
        return "empty"
    if keep.drop_truncated and sample["finish_reason"] == "length":
        return "truncated"
    if math.isnan(confidence):
        return "unscored"
    return "kept" if confidence >= least else "below_threshold"


def doubts(stage: Stage[KeepSettings], shard: int, samples: pa.Table) -> set[str]:
    """Ids of a shard's samples that the other teachers' mean score is too low for, or that none of them could score."""
    least = stage.settings.peer_review
    if least is None:
        return set()
    scores = mean_scores(stage.store, stage.input("samples"), shard)
    return {name for name in samples["sample_id"].to_pylist() if scores.get(name, -1.0) < least}


def choose(keep: Keep, scores: list[dict[str, Any]], confidences: list[float]) -> None:
    """Of several kept annotations of a prompt leave one: the majority's by final answer where that is the rule, and
    among these the one that the TA trusts most. The others are dropped as ``not_chosen``."""
    by_prompt: dict[str, list[int]] = {}
    for number, row in enumerate(scores):
        if row["kept"]:
            by_prompt.setdefault(row["prompt_id"], []).append(number)
    for prompt_id, numbers in by_prompt.items():
        standing = numbers
        if keep.answers == "majority":
            majority = consistency([scores[number]["final_answer"] for number in numbers], prompt_id).majority_answer
            standing = [number for number in numbers if scores[number]["final_answer"] == majority]
        best = max(standing, key=lambda number: confidences[number])
        for number in set(numbers) - {best}:
            scores[number] |= {"kept": False, "reason": "not_chosen"}


def filter_shard(
    stage: Stage[KeepSettings],
    shard: int,
    prompts: list[dict[str, Any]],
    samples: pa.Table,
    confidences: np.ndarray,
    fit: Fit | None,
    least: float,
) -> None:
    """Commit one shard's scores, kept rows and charged prompts."""
    keep, rows = stage.settings.keep, samples.to_pylist()
    doubted = doubts(stage, shard, samples)
    scores, kept = [], []
    deciding = (fit.map(confidences) if fit else confidences).tolist()
    for prompt, sample, raw, confidence in zip(prompts, rows, confidences.tolist(), deciding, strict=True):
        why = reason(keep, least, sample, confidence)
        why = "peer_review" if why == "kept" and sample["sample_id"] in doubted else why
        scores.append(
            {
                **{name: sample[name] for name in ("sample_id", "prompt_id", "text")},
                "source": prompt["source"],
                "final_answer": final_answer(prompt["verifier"], sample["text"], prompt["entry"]),
                "correct": is_correct(prompt["verifier"], sample["text"], prompt["answer"], prompt["entry"]),
                "ta_teacher": None if math.isnan(raw) else raw,
                "calibrated": confidence if fit and not math.isnan(raw) else None,
                "calibrates": sample["sample_id"] in fit.seen if fit else None,
                "kept": why == "kept",
                "reason": why,
            }
        )
    if keep.answers != "all":
        choose(keep, scores, deciding)
    for row, sample, confidence in zip(scores, rows, deciding, strict=True):
        if row["kept"]:
            kept.append(
                {
                    **{name: row[name] for name in ("sample_id", "prompt_id", "source")},
                    **{name: sample[name] for name in ("prompt_token_ids", "token_ids", "distributions")},
                    "row_id": sample["sample_id"],
                    "weight": confidence if keep.rule == "weight" else 1.0,
                }
            )
    charged = {
        sample["prompt_id"]: {
            "prompt_id": sample["prompt_id"],
            "source": prompt["source"],
            "prompt_token_ids": sample["prompt_token_ids"],
        }
        for prompt, sample in zip(prompts, rows, strict=True)
        if stage.settings.charges
    }
    stage.commit("scores", shard, pa.Table.from_pylist(scores, schema=schemas.SCORE))
    stage.commit("kept", shard, pa.Table.from_pylist(kept, schema=schemas.KEPT))
    stage.commit("charged", shard, pa.Table.from_pylist(list(charged.values()), schema=schemas.CHARGED))


def run(stage: Stage[KeepSettings]) -> None:
    score(stage)
    parts = {part.shard: part for part in stage.manifest.tables["confidence"].parts}
    # One float a row: the only column of the whole stage that has to be in memory at once.
    confidence_by_shard = {
        shard: read_part(stage.store, part)["confidence"].to_numpy() for shard, part in parts.items()
    }
    keep, fit, confidences = stage.settings.keep, None, np.concatenate([[], *confidence_by_shard.values()])
    if keep.calibrate:
        fit, known = fitted(
            pairs(stage), confidence_by_shard, keep.calibrate, stage.settings.seed, stage.settings.validation_share
        )
        stage.facts["calibration"] = {"known": known, "used": fit is not None}
    least = threshold(keep, fit.map(confidences) if fit else confidences)
    for shard, prompts, samples in pairs(stage):
        filter_shard(stage, shard, prompts, samples, confidence_by_shard[shard], fit, least)
    for table, schema in (("scores", schemas.SCORE), ("kept", schemas.KEPT), ("charged", schemas.CHARGED)):
        stage.close_table(table, schema)
    stage.facts.update(
        threshold=least,
        scored=stage.manifest.tables["scores"].rows,
        kept=stage.manifest.tables["kept"].rows,
        reasons=reasons(stage),
    )
    if not stage.facts["kept"]:
        raise ValueError(
            f"signals.keep.threshold: {stage.settings.keep.threshold} ({stage.settings.keep.rule}) kept none of "
            f"{stage.facts['scored']} annotations ({stage.facts['reasons']}): lower it"
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

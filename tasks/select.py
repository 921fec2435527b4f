"""Selection: which prompts are worth a teacher query.

    python -m tasks.select --spec SPEC.json

The student's samples of each candidate give its self-consistency; the TA scores the majority answer; the most uncertain
prompts by the rank average of both are selected, as many as the budget has queries left. Every candidate stays in
``signals`` with all its signals and its reason.
"""

import hashlib
from collections.abc import Iterable, Iterator
from math import isnan
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from infra.parts import read_part, read_table
from kernels.consistency import Consistency, consistency, rank_average
from kernels.selection import REASONS, SELECTED, choose
from tasks import schemas
from tasks.config.base import Config
from tasks.config.signals import Confidence, PTrue, Select
from tasks.engines import Call, engines, model_of
from tasks.sample import slices
from tasks.score import as_confidence, confidence_call
from tasks.stage import Stage, main
from tasks.verify import final_answer, is_correct

# Columns of SIGNAL that one prompt's samples and the TA decide; the others need all prompts.
OWN_COLUMNS = [field for field in schemas.SIGNAL if field.name not in ("uncertainty", "selected", "reason")]
OBSERVED = pa.schema(OWN_COLUMNS)


# What decides: self-consistency by its measure (column, and the sign that makes more of it doubt), and the others.
MEASURES = {"unique": ("unique_answers", 1.0), "majority": ("majority_share", -1.0), "entropy": ("entropy", 1.0)}


class SelectSettings(Config):
    """How prompts are ranked and how many are taken."""

    select: Select = Select()
    """The rule."""
    confidence: Confidence = PTrue()
    """How the TA's confidence is read."""
    queries: int = Field(ge=1)
    """Teacher queries left."""
    shard_size: int
    """The sampling stage's: prompts and samples are read side by side."""
    seed: int = 0
    """Seed of the run: random selection, and ties."""
    template_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template."""


# One shard: its number, its prompts, each prompt's answers compared, and each prompt's majority text.
Observed = tuple[int, list[dict[str, Any]], list[Consistency], list[str]]


def observe(stage: Stage[SelectSettings]) -> Iterator[Observed]:
    """Candidates shard by shard with what their samples agree on."""
    parts = {part.shard: part for part in stage.input("samples").tables["samples"].parts}
    for shard, table in slices(stage, "prompts", "candidates", stage.settings.shard_size):
        samples = read_part(stage.store, parts[shard], ["prompt_id", "text"])
        texts: dict[str, list[str]] = {}
        for prompt_id, text in zip(samples["prompt_id"].to_pylist(), samples["text"].to_pylist(), strict=True):
            texts.setdefault(prompt_id, []).append(text)
        # What the student's engine died of has no answers, and is no candidate.
        prompts = [prompt for prompt in table.to_pylist() if prompt["prompt_id"] in texts]
        agreements = [
            consistency(
                [final_answer(prompt["verifier"], text, prompt["entry"]) for text in texts[prompt["prompt_id"]]],
                prompt["prompt_id"],
            )
            for prompt in prompts
        ]
        majority = [
            texts[prompt["prompt_id"]][agreement.majority_index]
            for prompt, agreement in zip(prompts, agreements, strict=True)
        ]
        yield shard, prompts, agreements, majority


def observed_rows(
    prompts: list[dict[str, Any]],
    agreements: list[Consistency],
    texts: list[str],
    samples: int,
    confidences: list[float],
) -> pa.Table:
    """One shard's signals."""
    rows = [
        {
            "prompt_id": prompt["prompt_id"],
            "source": prompt["source"],
            "samples": samples,
            "unique_answers": agreement.unique,
            "majority_share": agreement.majority_share,
            "entropy": agreement.entropy,
            "majority_answer": agreement.majority_answer,
            "majority_text": text,
            "correct": is_correct(prompt["verifier"], text, prompt["answer"], prompt["entry"]),
            "ta_student": None if isnan(confidence) else confidence,
        }
        for prompt, agreement, text, confidence in zip(prompts, agreements, texts, confidences, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=OBSERVED)


def score(stage: Stage[SelectSettings]) -> None:
    """Commit the signals of every candidate."""
    settings = stage.settings
    done = stage.done("observed")
    sampled = stage.input("samples")
    samples = int(sampled.settings["sampling"]["samples"])
    total = sampled.tables["samples"].rows // samples
    assistant = model_of(stage, "models", "assistant")

    def calls() -> Iterator[tuple[Observed, Call]]:
        for observed in observe(stage):
            shard, prompts, _, texts = observed
            if shard not in done:
                conversations = [prompt["messages"] for prompt in prompts]
                yield (
                    observed,
                    confidence_call(settings.confidence, assistant, conversations, texts, settings.template_args),
                )

    prompts_done = sum(part.rows for part in done.values())
    stage.progress(prompts_done, total, "prompts")
    if prompts_done < total:
        with engines(stage) as access:
            for (shard, prompts, agreements, texts), result in access.pool("assistant", assistant).map(calls()):
                confidences = as_confidence(settings.confidence, result)
                stage.commit("observed", shard, observed_rows(prompts, agreements, texts, samples, confidences))
                prompts_done += len(prompts)
                stage.progress(prompts_done, total, "prompts")
    stage.close_table("observed", OBSERVED)


def draw(seed: int, prompt_id: str) -> int:
    """A prompt's random number: 63 bits, the same in every run of this seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}\x1fselect\x1f{prompt_id}".encode()).digest()[:8], "big") >> 1


def deciding_columns(select: Select) -> list[str]:
    """What is read of the observed: no more, as it is held for all candidates."""
    measure, _ = MEASURES[select.consistency]
    return list(dict.fromkeys(["prompt_id", "source", "unique_answers", measure, "ta_student", "correct"]))


def deciding(parts: Iterable[pa.Table], seed: int) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """What decides of N candidates: their signals, the number of each one's source [N], and the draw of each [N], which
    breaks ties. No text stays in memory: some 30 bytes a candidate, by the types of the columns."""
    small, draws = [], []
    for rows in parts:
        prompt_ids = rows["prompt_id"].to_pylist()
        draws.append(np.fromiter((draw(seed, prompt_id) for prompt_id in prompt_ids), np.int64, len(prompt_ids)))
        named = rows.drop_columns(["prompt_id", "source"])
        small.append(named.append_column("source", rows["source"].dictionary_encode()))
    columns = pa.concat_tables(small).unify_dictionaries()
    codes = [chunk.indices.to_numpy() for chunk in columns["source"].chunks]
    return columns, np.concatenate([np.empty(0, np.int32), *codes]), np.concatenate(draws)


def uncertainty(select: Select, columns: pa.Table) -> np.ndarray:
    """Of N prompts, 0 (certain) to 1: the rank average of the signals; random selection has none and gives 0.5 to all;
    the oracle knows what is wrong (1), right (0) and unknown (0.5)."""
    if select.rule == "random":
        return np.full(columns.num_rows, 0.5)
    if select.rule == "oracle":
        known = columns["correct"]
        return pc.if_else(pc.is_null(known), 0.5, pc.if_else(known, 0.0, 1.0)).to_numpy()
    column, sign = MEASURES[select.consistency]
    # An answer that the TA's engine died of is not worth a query: no doubt in it.
    doubts = [sign * columns[column].to_numpy(), 1.0 - pc.fill_null(columns["ta_student"], 1.0).to_numpy()]
    return rank_average(doubts, [select.consistency_weight, select.assistant_weight])


def run(stage: Stage[SelectSettings]) -> None:
    score(stage)
    settings = stage.settings
    parts = stage.manifest.tables["observed"].parts
    # A few small columns decide; the rows themselves are read again part by part.
    observed = read_table(stage.store, stage.manifest, "observed", deciding_columns(settings.select))
    columns, sources_N, ties_N = deciding(observed, settings.seed)
    uncertainty_N = uncertainty(settings.select, columns)
    order_N = np.lexsort((ties_N, -uncertainty_N))
    reasons_N = choose(
        order_N,
        sources_N,
        settings.queries,
        most=settings.select.source_share,
        balance=settings.select.balance,
    )
    selected_N = reasons_N == SELECTED

    position = 0
    for part, (shard, prompts) in zip(parts, slices(stage, "prompts", "candidates", settings.shard_size), strict=True):
        rows = read_part(stage.store, part)
        prompts = prompts.filter(pc.is_in(prompts["prompt_id"], rows["prompt_id"].combine_chunks()))
        here = slice(position, position + rows.num_rows)
        position += rows.num_rows
        chosen = selected_N[here]
        stage.commit(
            "signals",
            shard,
            rows.append_column("uncertainty", pa.array(uncertainty_N[here], pa.float32()))
            .append_column("selected", pa.array(chosen))
            .append_column("reason", pa.array([REASONS[code] for code in reasons_N[here]]))
            .cast(schemas.SIGNAL),
        )
        stage.commit("selected", shard, prompts.filter(pa.array(chosen)))
    stage.close_table("signals", schemas.SIGNAL)
    stage.close_table("selected", schemas.PROMPT)
    stage.facts.update(
        candidates=len(order_N),
        selected=int(selected_N.sum()),
        mean_unique_answers=float(np.mean(columns["unique_answers"].to_numpy())),
        mean_ta_student=pc.mean(columns["ta_student"]).as_py(),
    )


if __name__ == "__main__":
    main(SelectSettings, run)

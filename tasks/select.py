"""Selection: which prompts are worth a teacher query.

    python -m tasks.select --spec SPEC.json

The student's samples of each candidate give its self-consistency; the TA scores the majority answer; the most uncertain
prompts by the rank average of both are selected, as many as the budget has queries left. Every candidate stays in
``signals`` with all its signals and its reason.
"""

from collections.abc import Container, Iterator
from math import isnan
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from infra.parts import read_part, read_table
from kernels.consistency import Consistency, consistency
from tasks import schemas
from tasks.clusters import clustered
from tasks.config.base import Config
from tasks.config.signals import Confidence, PTrue, Select
from tasks.engines import Call, engines, model_of
from tasks.ranking import SELECTED, deciding_columns, ranking
from tasks.sample import slices
from tasks.score import as_confidence, confidence_call
from tasks.stage import Stage, main
from tasks.verify import final_answer, is_correct

# Columns of SIGNAL that one prompt's samples and the TA decide; the others need all prompts.
OWN_COLUMNS = [field for field in schemas.SIGNAL if field.name not in ("uncertainty", "selected", "reason")]
OBSERVED = pa.schema(OWN_COLUMNS)


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


def observe(stage: Stage[SelectSettings], done: Container[int]) -> Iterator[Observed]:
    """Candidates with what their samples agree on, shard by shard but for those that are done."""
    parts = {part.shard: part for part in stage.input("samples").tables["samples"].parts}
    for shard, table in slices(stage, "prompts", "candidates", stage.settings.shard_size):
        if shard in done:
            continue
        samples = read_part(stage.store, parts[shard], ["prompt_id", "text"])
        texts: dict[str, list[str]] = {}
        for prompt_id, text in zip(samples["prompt_id"].to_pylist(), samples["text"].to_pylist(), strict=True):
            texts.setdefault(prompt_id, []).append(text)
        # What the student's engine died of has no answers, and is no candidate.
        prompts = [prompt for prompt in table.to_pylist() if prompt["prompt_id"] in texts]
        agreements = [
            consistency(answers(prompt, texts[prompt["prompt_id"]], stage.settings.select), prompt["prompt_id"])
            for prompt in prompts
        ]
        majority = [
            texts[prompt["prompt_id"]][agreement.majority_index]
            for prompt, agreement in zip(prompts, agreements, strict=True)
        ]
        yield shard, prompts, agreements, majority


def answers(prompt: dict[str, Any], texts: list[str], select: Select) -> list[str | None]:
    """Final answers of a prompt's samples, such that those that agree are equal."""
    if prompt["verifier"] == "none":
        return clustered(texts, select.same_text)
    return [final_answer(prompt["verifier"], text, prompt["entry"]) for text in texts]


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
        for observed in observe(stage, done):
            _, prompts, _, texts = observed
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


def run(stage: Stage[SelectSettings]) -> None:
    score(stage)
    settings = stage.settings
    parts = stage.manifest.tables["observed"].parts
    # A few small columns decide; the rows themselves are read again part by part.
    columns = deciding_columns(settings.select)
    observed = read_table(stage.store, stage.manifest, "observed", columns)
    schema = pa.schema([OBSERVED.field(name) for name in columns])
    with ranking(observed, schema, settings.seed) as ranked:
        ranked.decide(settings.select, settings.queries)
        start = 0
        cut = slices(stage, "prompts", "candidates", settings.shard_size)
        for part, (shard, prompts) in zip(parts, cut, strict=True):
            rows, fates = read_part(stage.store, part), ranked.fates(start, start + part.rows)
            prompts = prompts.filter(pc.is_in(prompts["prompt_id"], rows["prompt_id"].combine_chunks()))
            chosen = pc.equal(fates["reason"], SELECTED)
            signals = rows.append_column("uncertainty", fates["uncertainty"]).append_column("selected", chosen)
            stage.commit("signals", shard, signals.append_column("reason", fates["reason"]).cast(schemas.SIGNAL))
            stage.commit("selected", shard, prompts.filter(chosen))
            start += part.rows
        means = "SELECT avg(unique_answers), avg(ta_student) FROM candidates"
        (stage.facts["mean_unique_answers"], stage.facts["mean_ta_student"]) = ranked.db.execute(means).fetchall()[0]
    stage.close_table("signals", schemas.SIGNAL)
    stage.close_table("selected", schemas.PROMPT)
    stage.facts.update(
        candidates=stage.manifest.tables["signals"].rows, selected=stage.manifest.tables["selected"].rows
    )


if __name__ == "__main__":
    main(SelectSettings, run)

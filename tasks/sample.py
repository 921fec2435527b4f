"""Sampling: one model answers prompts, shard by shard.

python -m tasks.sample --spec SPEC.json
"""

import hashlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from infra.manifest import fingerprint, read_part
from infra.models import ModelRef
from tasks import schemas
from tasks.config.base import Config
from tasks.config.signals import Distributions, SampledTokens, Sampling, TopTokens
from tasks.connection import connected
from tasks.engines import Call, engines, model_of, served_by
from tasks.quarantine import answered, close
from tasks.stage import Stage, main

# Columns that engines fill.
ANSWER = ("prompt_token_ids", "token_ids", "text", "finish_reason", "logprob", "token_logprobs")


class SampleSettings(Config):
    """Who answers what, and how."""

    role: str
    """Written into every row; enters ids and seeds."""
    engine: str
    """Key of the model in the input ``models`` whose engine answers."""
    weights: str | None = None
    """Input manifest whose ``student`` is answered with; the engine's own model where absent."""
    table: str
    """Table of the input ``prompts``."""
    limit: int | None = None
    """Only so many of its prompts."""
    sampling: Sampling
    """Temperature, nucleus, length, responses per prompt."""
    seed: int = 0
    """Seed of the run."""
    shard_size: int = Field(default=256, ge=1)
    """Prompts of one shard."""
    logprobs: bool = False
    """Ask for log-probabilities."""
    distributions: Distributions | None = None
    """Keep the model's distributions at every response position."""
    template_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template."""


def slices(
    stage: Stage[Any], name: str, table: str, size: int, limit: int | None = None
) -> Iterator[tuple[int, pa.Table]]:
    """An input table, or its first rows, cut into numbered shards of at most ``size`` rows; the same cut whenever it is
    made."""
    shard, left = 0, sys.maxsize if limit is None else limit
    for part in stage.read(name, table):
        for start in range(0, min(left, part.num_rows), size):
            yield shard, part.slice(start, min(size, left - start))
            shard += 1
        left -= min(left, part.num_rows)


def sample_seed(*parts: Any) -> int:
    """63 bits of SHA-256 over what identifies a sample: (run seed, role, prompt id, sample index)."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample_id(prompt_id: str, role: str, revision: str, sampling: Sampling, index: int, seed: int) -> str:
    """Equal for a redone shard: it names the question and the draw, not the text."""
    return fingerprint([prompt_id, role, revision, sampling.model_dump(exclude={"samples"}), index, seed])


def sample_rows(answers: pa.Table, prompt_ids: list[str], model: ModelRef, settings: SampleSettings) -> pa.Table:
    """An engine's answers as SAMPLE rows."""
    count, rows = settings.sampling.samples, answers.num_rows
    prompts = [prompt_ids[number] for number in answers["conversation"].to_pylist()]
    indices = [number % count for number in range(rows)]
    seeds = answers["seed"].to_pylist()
    ids = [
        sample_id(prompt, settings.role, model.revision, settings.sampling, index, seed)
        for prompt, index, seed in zip(prompts, indices, seeds, strict=True)
    ]
    columns = {
        "sample_id": ids,
        "prompt_id": prompts,
        "role": [settings.role] * rows,
        "model": [model.name] * rows,
        "revision": [model.revision] * rows,
        "sample_index": indices,
        "seed": seeds,
        **{name: answers[name] for name in ANSWER},
    }
    return pa.table(columns, schema=schemas.SAMPLE)


def best_tokens(rows: pa.Table, answers: pa.Table, settings: TopTokens, vocabulary: int) -> pa.Table:
    """Answers' distributions as the engine returned them, in DISTRIBUTION's columns."""
    import torch

    from kernels.codec import encode_topk

    columns, own = (answers["best_ids"].to_pylist(), answers["best_logprobs"].to_pylist()), settings.model_dump()
    del own["type"]
    blobs = [
        encode_topk(
            torch.tensor(ids).view(-1, settings.limit),
            torch.tensor(logprobs).view(-1, settings.limit),
            vocabulary,
            **own,
        )
        for ids, logprobs in zip(*columns, strict=True)
    ]
    return pa.table({"sample_id": rows["sample_id"], "distributions": blobs}, schema=schemas.DISTRIBUTION)


def read_again(stage: Stage[SampleSettings], model: ModelRef, settings: SampledTokens) -> None:
    """Commit the distributions of all samples, read by the model in torch, shard by shard."""
    import ray

    from tasks.engines import release_engines
    from tasks.reader import start_reader

    runtime, done = stage.spec.runtime, stage.done("distributions")
    parts = [part for part in stage.manifest.tables["samples"].parts if part.shard not in done]
    if not parts:
        return
    gpu = bool(runtime.engines.get(stage.settings.engine, {}).get("gpu"))
    with connected(runtime):
        if gpu and runtime.namespace:
            release_engines(runtime.namespace)
        reader = start_reader(stage.spec.root, model, gpu)
        for number, part in enumerate(parts, 1):
            rows = read_part(stage.store, part, ["sample_id", "seed", "prompt_token_ids", "token_ids"])
            columns = [rows[name].to_pylist() for name in ("prompt_token_ids", "token_ids", "seed")]
            blobs = ray.get(reader.encode.remote(*columns, settings.model_dump()))
            table = pa.table({"sample_id": rows["sample_id"], "distributions": blobs}, schema=schemas.DISTRIBUTION)
            stage.commit("distributions", part.shard, table)
            stage.progress(number, len(parts), "shards read again")
        ray.kill(reader)


def run(stage: Stage[SampleSettings]) -> None:
    settings, sampling = stage.settings, stage.settings.sampling
    base = model_of(stage, "models", settings.engine)
    model = model_of(stage, settings.weights, "student") if settings.weights else base
    top = settings.distributions if isinstance(settings.distributions, TopTokens) else None
    done = stage.done("samples")
    total = stage.input("prompts").tables[settings.table].rows
    total = total if settings.limit is None else min(total, settings.limit)
    prompts_done = sum(part.rows for part in done.values()) // sampling.samples
    tokens, began = 0, time.monotonic()

    def calls() -> Iterator[tuple[tuple[int, list[str]], Call]]:
        for shard, prompts in slices(stage, "prompts", settings.table, settings.shard_size, settings.limit):
            if shard in done:
                continue
            prompt_ids = prompts["prompt_id"].to_pylist()
            seeds = [
                [sample_seed(settings.seed, settings.role, prompt, index) for index in range(sampling.samples)]
                for prompt in prompt_ids
            ]
            arguments = (model.model_dump(), prompts["messages"].to_pylist(), seeds)
            options: dict[str, Any] = {
                **sampling.model_dump(exclude={"samples"}),
                "logprobs": settings.logprobs,
                "best_tokens": top.limit if top else 0,
                "template_args": settings.template_args,
            }
            yield (shard, prompt_ids), Call("generate", arguments, options)

    stage.progress(prompts_done, total, "prompts")
    if prompts_done < total:
        server = served_by(stage.store, base, model)
        with engines(stage) as access:
            for (shard, prompt_ids), answers in access.pool(settings.engine, server).map(calls()):
                answers = answered(stage, shard, answers, prompt_ids)
                rows = sample_rows(answers, prompt_ids, model, settings)
                if top:
                    stage.commit("distributions", shard, best_tokens(rows, answers, top, model.vocab_size))
                stage.commit("samples", shard, rows)
                prompts_done += len(prompt_ids)
                tokens += pc.sum(pc.list_value_length(rows["token_ids"])).as_py() or 0
                rate = tokens / (time.monotonic() - began)
                stage.progress(prompts_done, total, "prompts", tokens=tokens, tokens_per_second=round(rate, 1))
    seconds = time.monotonic() - began
    stage.close_table("samples", schemas.SAMPLE)
    close(stage)
    if isinstance(settings.distributions, SampledTokens):
        read_again(stage, model, settings.distributions)
    if settings.distributions:
        stage.close_table("distributions", schemas.DISTRIBUTION)
    stage.facts.update(token_counts(stage, "samples"))
    stage.facts.update(
        queries=stage.manifest.tables["samples"].rows,
        engine_seconds=round(seconds, 3),
        tokens_per_second=round(tokens / seconds, 2) if tokens else None,
        model=model.name,
        revision=model.revision,
    )


def token_counts(stage: Stage[Any], table: str) -> dict[str, int]:
    """Prompt and response tokens over all parts of an own table, those of earlier attempts included."""
    counts = {"prompt_tokens": 0, "completion_tokens": 0}
    for part in stage.manifest.tables[table].parts:
        rows = read_part(stage.store, part, ["prompt_token_ids", "token_ids"])
        for name, column in (("prompt_tokens", "prompt_token_ids"), ("completion_tokens", "token_ids")):
            counts[name] += pc.sum(pc.list_value_length(rows[column])).as_py() or 0
    return counts


if __name__ == "__main__":
    main(SampleSettings, run)

"""Sampling: one model answers prompts, shard by shard.

python -m tasks.sample --spec SPEC.json
"""

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from infra.manifest import fingerprint
from infra.models import ModelRef
from infra.parts import read_part
from tasks import schemas
from tasks.asking import Asking, Shard
from tasks.calls import Call
from tasks.config.auxiliary import PLACE
from tasks.config.base import Config
from tasks.config.signals import Distributions, SampledTokens, Sampling, TopTokens
from tasks.distributions import best_tokens, read_again
from tasks.engines import engines, model_of, served_by
from tasks.ledger import Caps
from tasks.purse import Purse
from tasks.quarantine import answered, close
from tasks.routing import Chosen, Further, Route, further, routed
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
    template: str | None = None
    """What is asked in place of each prompt's last user turn, which it holds as {question}; absent: the prompt."""
    limit: int | None = None
    """Only so many of its prompts."""
    route: Route | None = None
    """Only those that go to one of several teachers; all where absent."""
    further: Further | None = None
    """Only so many that another table has not; all where absent."""
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
    caps: Caps | None = None
    """What the prompts of this table may be charged, with those of ``charged_by``; none: nothing is charged."""
    charged_by: str | None = None
    """Input manifest of an earlier stage that is charged to the same budget."""
    prompt_tokens: int | None = None
    """Longest prompt, tokens of the model; absent for an endpoint, whose tokenizer is not known."""


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


def worded(prompts: list[dict[str, Any]], template: str | None) -> list[dict[str, Any]]:
    """The prompts with the template around their last user turn; as they are without one."""
    if template is None:
        return prompts
    found = []
    for prompt in prompts:
        messages = list(prompt["messages"])
        place = max((n for n, turn in enumerate(messages) if turn["role"] == "user"), default=len(messages) - 1)
        content = template.replace(PLACE, messages[place]["content"])
        messages[place] = {**messages[place], "content": content}
        found.append({**prompt, "messages": messages})
    return found


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


def answer(stage: Stage[SampleSettings], base: ModelRef, model: ModelRef, purse: Purse | None) -> None:
    """Commit the answers to every prompt that has none yet."""
    settings, sampling = stage.settings, stage.settings.sampling
    top = settings.distributions if isinstance(settings.distributions, TopTokens) else None
    done = {shard: part.rows // sampling.samples for shard, part in stage.done("samples").items()}
    if purse:
        # Not every prompt has samples, but each has its charge.
        done = {shard: part.rows for shard, part in stage.done("queries").items() if shard in done}
    chosen = chosen_prompts(stage)
    total = stage.input("prompts").tables[settings.table].rows
    total = total if settings.limit is None else min(total, settings.limit)
    left: Callable[[], dict[str, Any]] = purse.left if purse else dict
    asked, tokens, began = sum(done.values()), 0, time.monotonic()

    def cut() -> Iterator[tuple[int, pa.Table]]:
        for number, prompts in slices(stage, "prompts", settings.table, settings.shard_size, settings.limit):
            yield number, chosen(prompts) if chosen else prompts

    def shards() -> Iterator[Shard]:
        for number, prompts in cut():
            if number not in done and prompts.num_rows:
                yield Shard(number, worded(prompts.select(["prompt_id", "messages"]).to_pylist(), settings.template))

    def call(prompts: list[dict[str, Any]], spare: int) -> Call:
        ids = [prompt["prompt_id"] for prompt in prompts]
        indices = range(sampling.samples)
        seeds = [[sample_seed(settings.seed, settings.role, name, index) for index in indices] for name in ids]
        options: dict[str, Any] = {
            **sampling.model_dump(exclude={"samples"}),
            "logprobs": settings.logprobs,
            "best_tokens": top.limit if top else 0,
            "template_args": settings.template_args,
            **({"spare": spare} if spare else {}),
        }
        return Call("generate", (model.model_dump(), [prompt["messages"] for prompt in prompts], seeds), options)

    def commit(shard: Shard) -> None:
        nonlocal asked, tokens
        prompt_ids = [prompt["prompt_id"] for prompt in shard.prompts]
        if purse:
            purse.charge(shard.number, prompt_ids, shard.used, shard.reasons)
        rows, distributions = schemas.SAMPLE.empty_table(), schemas.DISTRIBUTION.empty_table()
        if shard.answers:
            # Requests that an engine died of have fewer columns than an endpoint's answers.
            joined = pa.concat_tables(shard.answers, promote_options="default")
            answers = answered(stage, shard.number, joined, prompt_ids)
            rows = sample_rows(answers, prompt_ids, model, settings)
            distributions = best_tokens(rows, answers, top, model.vocab_size) if top else distributions
        if top:
            stage.commit("distributions", shard.number, distributions)
        stage.commit("samples", shard.number, rows)
        asked += len(prompt_ids)
        tokens += pc.sum(pc.list_value_length(rows["token_ids"])).as_py() or 0
        rate = tokens / (time.monotonic() - began)
        stage.progress(asked, total, "prompts", tokens=tokens, tokens_per_second=round(rate, 1), **left())

    if chosen:
        total = 0
        for number, prompts in cut():
            total += prompts.num_rows
            if number not in done and not prompts.num_rows:
                # Who reads prompts and samples side by side finds every shard.
                commit(Shard(number, []))
    stage.progress(asked, total, "prompts", **left())
    if asked < total:
        asking, server = Asking(shards(), call, commit, purse), served_by(stage.store, base, model)
        with engines(stage) as access:
            repeats = asking if purse else None
            for wave, answers in access.pool(settings.engine, server).map(asking.calls(), repeats):
                asking.take(wave, answers)
    seconds = time.monotonic() - began
    stage.close_table("samples", schemas.SAMPLE)
    close(stage)
    stage.facts.update(
        engine_seconds=round(seconds, 3), tokens_per_second=round(tokens / seconds, 2) if tokens else None
    )


def chosen_prompts(stage: Stage[SampleSettings]) -> Chosen | None:
    """What of the table's prompts is asked; None: all."""
    settings = stage.settings
    if settings.route:
        return routed(settings.route, settings.seed)
    return further(stage, settings.further, settings.table, settings.seed) if settings.further else None


def run(stage: Stage[SampleSettings]) -> None:
    settings = stage.settings
    base = model_of(stage, "models", settings.engine)
    model = model_of(stage, settings.weights, "student") if settings.weights else base
    purse = Purse(stage, settings.caps) if settings.caps else None
    if "endpoint" in stage.spec.runtime.engines.get(settings.engine, {}) and not purse:
        raise ValueError("caps: an endpoint is asked within a budget only: set caps")
    answer(stage, base, model, purse)
    if isinstance(settings.distributions, SampledTokens):
        read_again(stage, model, settings.distributions)
    if settings.distributions:
        stage.close_table("distributions", schemas.DISTRIBUTION)
    stage.facts.update(token_counts(stage, "samples"))
    rows = stage.manifest.tables["samples"].rows
    stage.facts.update(queries=rows, model=model.name, revision=model.revision)
    if purse:
        stage.close_table("queries", schemas.QUERY)
        stage.facts.update(purse.facts(), queries=purse.ledger.charged.queries)
        # Of several teachers one may have no prompts of its own; what is asked beside the answers gets what they left.
        if not rows and not settings.route and settings.template is None:
            raise ValueError(f"budget: it covers not one prompt of {settings.table}; left are {purse.left()['left']}")
    if settings.further and not rows:
        raise ValueError("mentor.prompts: no candidates are left beside the selected ones: raise signals.candidates")


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

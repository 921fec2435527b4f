"""Evaluation: models answer held-out prompts, and say how likely they find the reference responses.

python -m tasks.evaluate --spec SPEC.json
"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from infra.models import ModelRef
from infra.parts import read_part
from tasks import schemas
from tasks.config.base import Config
from tasks.config.evaluate import EvaluateConfig
from tasks.engines import Call, EngineAccess, engines, model_of, served_by
from tasks.sample import sample_seed, slices
from tasks.stage import Stage, main
from tasks.verify import final_answer, is_correct, rouge_l

REFERENCE = pa.schema([("prompt_id", pa.string()), ("reference", pa.string())])


class Entry(Config):
    """One model to evaluate."""

    label: str
    """base | teacher | warmup | final | promoted"""
    engine: str
    """Key in the input ``models`` whose engine serves it."""
    weights: str | None = None
    """Input manifest whose student is served; the engine's own model where absent."""


class EvaluateSettings(Config):
    """Which models, on which terms."""

    entries: list[Entry] = Field(min_length=1)
    """In the order they are served; entries of one engine stand together."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Seeds, sampling, reference."""
    seed: int = 0
    """Seed of the run."""
    shard_size: int = Field(default=256, ge=1)
    """Prompts of one shard."""
    references: str | None = None
    """Input manifest with the teacher's reference responses; made here where absent and asked for."""
    template_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template."""


# A shard of work: its table, shard number, prompts, and the engine call that does it.
Work = tuple[tuple[str, int, list[dict[str, Any]]], Call]


class Evaluation:
    """The stage's state while it runs: references, and what is done."""

    def __init__(self, stage: Stage[EvaluateSettings]) -> None:
        self.stage, self.settings = stage, stage.settings
        heldout = slices(stage, "prompts", "heldout", self.settings.shard_size)
        self.shards = [(shard, prompts.to_pylist()) for shard, prompts in heldout]
        self.done = {name: stage.done(name) for name in ("references", "evaluations", "losses")}
        entries = len(self.settings.entries)
        self.steps_total = len(self.shards) * (2 * entries + self.makes_references)
        self.steps = sum(map(len, self.done.values()))
        self.references: dict[str, str] = {}

    @property
    def makes_references(self) -> bool:
        return self.settings.evaluate.reference == "teacher" and self.settings.references is None

    def model(self, entry: Entry) -> ModelRef:
        base = model_of(self.stage, "models", entry.engine)
        return model_of(self.stage, entry.weights, "student") if entry.weights else base

    def number(self, entry: Entry, shard: int) -> int:
        return self.settings.entries.index(entry) * len(self.shards) + shard

    def generate(
        self, model: dict[str, Any], prompts: list[dict[str, Any]], seeds: list[list[int]], temperature: float
    ) -> Call:
        options = {"temperature": temperature, "top_p": 1.0, "max_tokens": self.settings.evaluate.max_tokens}
        conversations = [prompt["messages"] for prompt in prompts]
        template_args = {"template_args": self.settings.template_args}
        return Call("generate", (model, conversations, seeds), {**options, **template_args})

    def reference_calls(self) -> Iterator[Work]:
        """The teacher's greedy answers."""
        teacher = model_of(self.stage, "models", "teacher").model_dump()
        for shard, prompts in self.shards:
            if shard not in self.done["references"]:
                yield ("references", shard, prompts), self.generate(teacher, prompts, [[0]] * len(prompts), 0.0)

    def entry_calls(self, entry: Entry) -> Iterator[Work]:
        """Sampled answers, then the likelihood of references, of one model."""
        evaluate, model = self.settings.evaluate, self.model(entry).model_dump()
        for shard, prompts in self.shards:
            number = self.number(entry, shard)
            if number not in self.done["evaluations"]:
                # The same seeds for every model: differences are paired.
                seeds = [
                    [sample_seed(self.settings.seed, "evaluate", prompt["prompt_id"], seed) for seed in evaluate.seeds]
                    for prompt in prompts
                ]
                call = self.generate(model, prompts, seeds, evaluate.temperature)
                yield ("evaluations", number, prompts), call
            if number not in self.done["losses"]:
                referenced = [prompt for prompt in prompts if self.reference(prompt)]
                texts = [self.reference(prompt) for prompt in referenced]
                asked = [prompt["messages"] for prompt in referenced]
                call = Call("mean_logprob", (model, asked, texts), {"template_args": self.settings.template_args})
                yield ("losses", number, referenced), call

    def reference(self, prompt: dict[str, Any]) -> str | None:
        if self.settings.evaluate.reference == "teacher":
            return self.references.get(prompt["prompt_id"])
        return prompt["reference"]

    def load_references(self) -> None:
        """The teacher's references, from this stage's own table or an earlier one's."""
        if self.settings.evaluate.reference == "teacher":
            if self.settings.references:
                tables = list(self.stage.read(self.settings.references, "references"))
            else:
                tables = [read_part(self.stage.store, part) for part in self.stage.done("references").values()]
            for table in tables:
                self.references.update(zip(table["prompt_id"].to_pylist(), table["reference"].to_pylist(), strict=True))

    def perform(self, access: EngineAccess, engine: str, model: ModelRef, calls: Iterator[Work], label: str) -> None:
        """Have the model's engine do the calls, and commit each as it comes."""
        pool = access.pool(engine, model)
        for (table, shard, prompts), result in pool.map(calls):
            if table == "references":
                rows = pa.table(
                    {"prompt_id": [prompt["prompt_id"] for prompt in prompts], "reference": result["text"]},
                    schema=REFERENCE,
                )
            elif table == "evaluations":
                rows = self.evaluated(label, prompts, result)
            else:
                rows = losses(label, prompts, *result)
            self.stage.commit(table, shard, rows)
            self.steps += 1
            self.stage.progress(self.steps, self.steps_total, "shards", now=label)

    def evaluated(self, label: str, prompts: list[dict[str, Any]], answers: pa.Table) -> pa.Table:
        """Marked answers as EVALUATION rows."""
        rows, seeds = [], len(self.settings.evaluate.seeds)
        for number, answer in enumerate(answers.to_pylist()):
            prompt = prompts[answer["conversation"]]
            reference = self.reference(prompt)
            # What the engine died of is an answer that is not there, and a wrong one.
            text = answer["text"] or ""
            rows.append(
                {
                    "label": label,
                    "prompt_id": prompt["prompt_id"],
                    "source": prompt["source"],
                    "sample_index": number % seeds,
                    "seed": self.settings.evaluate.seeds[number % seeds],
                    "text": text,
                    "final_answer": final_answer(prompt["verifier"], text, prompt["entry"]),
                    "correct": is_correct(prompt["verifier"], text, prompt["answer"], prompt["entry"]),
                    "rouge_l": rouge_l(text, [reference]) if reference else None,
                    "tokens": len(answer["token_ids"] or []),
                    "finish_reason": answer["finish_reason"],
                }
            )
        return pa.Table.from_pylist(rows, schema=schemas.EVALUATION)


def losses(label: str, prompts: list[dict[str, Any]], means: list[float], counts: list[int]) -> pa.Table:
    """Response losses as rows: the loss is the negative mean log-probability. What the engine died of has none."""
    table = pa.table(
        {
            "label": [label] * len(prompts),
            "prompt_id": [prompt["prompt_id"] for prompt in prompts],
            "source": [prompt["source"] for prompt in prompts],
            "loss": [-mean for mean in means],
            "tokens": counts,
        },
        schema=schemas.RESPONSE_LOSS,
    )
    return table.filter(pc.is_finite(table["loss"]))


def run(stage: Stage[EvaluateSettings]) -> None:
    evaluation = Evaluation(stage)
    stage.progress(evaluation.steps, evaluation.steps_total, "shards")
    if evaluation.steps < evaluation.steps_total:
        with engines(stage) as access:
            if evaluation.makes_references:
                teacher = model_of(stage, "models", "teacher")
                evaluation.perform(access, "teacher", teacher, evaluation.reference_calls(), "references")
            evaluation.load_references()
            for entry in stage.settings.entries:
                base = served_by(stage.store, model_of(stage, "models", entry.engine), evaluation.model(entry))
                evaluation.perform(access, entry.engine, base, evaluation.entry_calls(entry), entry.label)
    if evaluation.makes_references:
        stage.close_table("references", REFERENCE)
    stage.close_table("evaluations", schemas.EVALUATION)
    stage.close_table("losses", schemas.RESPONSE_LOSS)
    tokens = sum(
        pc.sum(read_part(stage.store, part, ["tokens"])["tokens"]).as_py() or 0
        for part in stage.manifest.tables["evaluations"].parts
    )
    stage.facts.update(completion_tokens=tokens, rows=stage.manifest.tables["evaluations"].rows)


if __name__ == "__main__":
    main(EvaluateSettings, run)

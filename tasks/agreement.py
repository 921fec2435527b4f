"""Agreement: the TA answers the prompts that the teacher annotated, to see whether both come to one final answer."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from infra.models import ModelRef
from infra.parts import read_part
from tasks.calls import Call
from tasks.config.signals import Agreement
from tasks.engines import EnginePool
from tasks.stage import Stage
from tasks.verify import final_answer

# The TA's own answers, one row a prompt.
TABLE = "assistant_answers"
ANSWER = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("text", pa.string()),  # null if its engine died of the prompt
        ("final_answer", pa.string()),
        ("finish_reason", pa.string()),  # stop | length, or what the engine died of
    ]
)
Prompts = list[dict[str, Any]]


def has_answer(prompt: dict[str, Any]) -> bool:
    """Whether the prompt has a final answer to agree on."""
    return prompt["verifier"] != "none"


def ask(
    stage: Stage[Any],
    pool: EnginePool,
    assistant: ModelRef,
    settings: Agreement,
    shards: Iterator[tuple[int, Prompts]],
    total: int,
    template_args: dict[str, Any],
) -> None:
    """Commit the TA's answers. ``shards``: so many times (number, prompt rows, those of one prompt being alike)."""
    done = stage.done(TABLE)
    answered = len(done)
    options = {"temperature": 0.0, "top_p": 1.0, "max_tokens": settings.max_tokens, "template_args": template_args}

    def calls() -> Iterator[tuple[tuple[int, Prompts], Call]]:
        for shard, rows in shards:
            prompts = list({row["prompt_id"]: row for row in rows if has_answer(row)}.values())
            if shard not in done and not prompts:
                stage.commit(TABLE, shard, ANSWER.empty_table())
            elif shard not in done:
                conversations = [prompt["messages"] for prompt in prompts]
                seeds = [[0]] * len(prompts)
                yield (shard, prompts), Call("generate", (assistant.model_dump(), conversations, seeds), options)

    for (shard, prompts), answers in pool.map(calls()):
        rows = []
        for prompt, answer in zip(prompts, answers.select(["text", "finish_reason"]).to_pylist(), strict=True):
            text = answer["text"]
            final = None if text is None else final_answer(prompt["verifier"], text, prompt["entry"])
            rows.append({"prompt_id": prompt["prompt_id"], "final_answer": final, **answer})
        stage.commit(TABLE, shard, pa.Table.from_pylist(rows, schema=ANSWER))
        answered += 1
        stage.progress(answered, total, "shards that the TA answered")


def answers_of(stage: Stage[Any], shard: int) -> dict[str, dict[str, Any]]:
    """A shard's answers by prompt id."""
    part = stage.manifest.tables[TABLE].by_shard[shard]
    return {row["prompt_id"]: row for row in read_part(stage.store, part).to_pylist()}


def disagrees(prompt: dict[str, Any], final: str | None, answers: dict[str, dict[str, Any]]) -> bool:
    """Whether a final answer to the prompt is not the TA's. One that could not be extracted agrees with nothing."""
    return has_answer(prompt) and (final is None or final != answers[prompt["prompt_id"]]["final_answer"])

"""The TA's confidence that an answer to a prompt is right, between 0 and 1."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from infra.models import ModelRef
from tasks.config.signals import Confidence, PTrue

# What of a conversation the TA is shown. System prompts are instructions to the answering model, not part of the question.
QUESTION_ROLES = ("user", "assistant", "tool")


def question(messages: list[dict[str, str]]) -> str:
    """The conversation as the TA reads it: the question alone where it is one turn, else every turn by its role."""
    turns = [message for message in messages if message["role"] in QUESTION_ROLES]
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def filled(template: str, question: str, answer: str) -> str:
    """The template with both texts in place. Not ``str.format``: braces in a prompt are text, and a question that
    holds "{answer}" stays a question."""
    before, mark, after = template.partition("{answer}")
    return before.replace("{question}", question) + (answer if mark else "") + after.replace("{question}", question)


def confidence_call(
    confidence: Confidence,
    model: ModelRef,
    conversations: list[list[dict[str, str]]],
    answers: pa.Table,
    template_args: dict[str, Any],
) -> Callable[[Any], Any]:
    """One engine call that scores a shard. ``answers`` has columns prompt_token_ids, token_ids, text, aligned with the
    conversations; the result is a list of p_true (0 to 1), or of mean log-probabilities (nats) that
    ``as_confidence`` maps to 0…1."""
    if isinstance(confidence, PTrue):
        texts = [
            filled(confidence.template, question(conversation), text)
            for conversation, text in zip(conversations, answers["text"].to_pylist(), strict=True)
        ]
        return lambda engine: engine.choice.remote(
            model.model_dump(),
            texts,
            prefill=confidence.prefill,
            first=confidence.true,
            second=confidence.false,
            template_args=template_args,
        )
    prompts, responses = answers["prompt_token_ids"].to_pylist(), answers["token_ids"].to_pylist()
    return lambda engine: engine.mean_logprob.remote(model.model_dump(), prompts, responses)


def as_confidence(confidence: Confidence, values: list[float]) -> list[float]:
    """exp(mean log-probability) is the geometric mean probability of a token, so both kinds lie between 0 and 1."""
    from math import exp

    return values if isinstance(confidence, PTrue) else [exp(value) for value in values]

"""The TA's confidence that an answer to a prompt is right, between 0 and 1."""

import re
from math import exp, nan
from typing import Any

from infra.models import ModelRef
from tasks.config.signals import Confidence, PTrue, Verbalized
from tasks.engines import Call

# What of a conversation the TA is shown. A system prompt instructs the answering model; it is not the question.
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


def rating(text: str) -> float:
    """The first number of a rating from 1 to 5, as 0 to 1; 0 where there is none."""
    found = re.search(r"(?<![\d.])[1-5](?![\d])", text)
    return (int(found.group()) - 1) / 4 if found else 0.0


def confidence_call(
    confidence: Confidence,
    model: ModelRef,
    conversations: list[list[dict[str, str]]],
    texts: list[str],
    template_args: dict[str, Any],
) -> Call:
    """One engine call that scores a shard of answers, aligned with their conversations. ``as_confidence`` reads its
    result."""
    if isinstance(confidence, PTrue):
        questions = [
            filled(confidence.template, question(conversation), text)
            for conversation, text in zip(conversations, texts, strict=True)
        ]
        options = {"prefill": confidence.prefill, "first": confidence.true, "second": confidence.false}
        return Call("choice", (model.model_dump(), questions), {**options, "template_args": template_args})
    if isinstance(confidence, Verbalized):
        asked = [
            [{"role": "user", "content": filled(confidence.template, question(conversation), text)}]
            for conversation, text in zip(conversations, texts, strict=True)
        ]
        greedy = {"temperature": 0.0, "top_p": 1.0, "max_tokens": confidence.max_tokens}
        seeds = [[0]] * len(asked)
        return Call("generate", (model.model_dump(), asked, seeds), {**greedy, "template_args": template_args})
    return Call("mean_logprob", (model.model_dump(), conversations, texts), {"template_args": template_args})


def as_confidence(confidence: Confidence, result: Any) -> list[float]:
    """Confidences from an engine's answer: p_true as it is; exp of the mean log-probability, which is the geometric
    mean probability of a token; a rating from 1 to 5 spread over 0 to 1. All lie between 0 and 1; NaN where the engine
    died of the question."""
    if isinstance(confidence, Verbalized):
        return [nan if text is None else rating(text) for text in result["text"].to_pylist()]
    return result if isinstance(confidence, PTrue) else [exp(mean) for mean in result[0]]

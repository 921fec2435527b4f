"""A model behind an OpenAI-compatible endpoint, as the same kind of Ray actor as an engine: text in and out, rows in
the student's tokens.

What a try that failed may have cost is told apart: a request that was refused (429, 503, no connection) took nothing,
one whose reply was lost may have been written and billed. The caller grants so many of these to be sent again.
"""

import asyncio
import hashlib
import os
import time
import uuid
from typing import Any, NamedTuple

import httpx
import pyarrow as pa
from pydantic import BaseModel, Field
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential

from infra.models import ModelRef
from infra.store import open_store
from infra.tokens import Tokens

CONNECT_SECONDS = 20.0
# Longest pause between two tries, unless the endpoint asks for a longer one.
PAUSE_SECONDS = 60.0
LONGEST_PAUSE_SECONDS = 3600.0


class EndpointSpec(BaseModel):
    """Everything the actor is started with; the key itself is read from the environment where it runs."""

    model: str
    base_url: str
    key_variable: str | None = None
    send_seed: bool = True
    extra: dict[str, Any] = Field(default_factory=dict)
    requests_per_minute: float | None = None
    concurrency: int = 8
    timeout_seconds: float = 120.0
    tries: int = 6
    template_tokens: int = 16
    limit_field: str = "max_tokens"
    tokenizer: ModelRef
    root: str
    replicas: int = 1
    gpu: bool = False
    deadline_seconds: float = 86400.0  # of a call: a slow pace is no silence

    @property
    def key(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]

    def actor_name(self, replica: int) -> str:
        return f"endpoint-{self.key}-{replica}"

    @property
    def environment(self) -> dict[str, str]:
        return {"TOKENIZERS_PARALLELISM": "false"}


def longest(messages: list[dict[str, str]], template_tokens: int) -> int:
    """Prompt tokens that an endpoint can count at most: no tokenizer in use makes more tokens of a text than it has
    bytes, and each message, and the answer's start, is wrapped in some of the template's."""
    return sum(len(message["content"].encode()) + template_tokens for message in messages) + template_tokens


class Fault(Exception):
    """A try without an answer. ``again``: another may have one; ``billed``: it may have cost something; ``fatal``: no
    request will have an answer; ``pause``: seconds the endpoint asks for."""

    def __init__(
        self, message: str, *, again: bool = False, billed: bool = False, fatal: bool = False, pause: float = 0
    ):
        super().__init__(message)
        self.again, self.billed, self.fatal, self.pause = again, billed, fatal, pause


class Reply(NamedTuple):
    """What came of one request. ``lost``: tries beside its own one that may have been billed; ``outage``: it had no
    answer for no fault of its own."""

    text: str | None
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    lost: int
    error: str | None
    outage: bool


class Pace:
    """Turns at so many a minute, evenly."""

    def __init__(self, per_minute: float | None) -> None:
        self.interval, self.next = 60 / per_minute if per_minute else 0.0, 0.0

    async def turn(self) -> None:
        now = time.monotonic()
        start = max(self.next, now)
        self.next = start + self.interval
        await asyncio.sleep(start - now)


def pause(state: RetryCallState) -> float:
    """Seconds before the next try: exponential with full jitter, and at least what the endpoint asked for."""
    fault = state.outcome.exception() if state.outcome else None
    return max(wait_random_exponential(multiplier=0.5, max=PAUSE_SECONDS)(state), getattr(fault, "pause", 0.0))


class Endpoint:
    """The actor. ``generate`` is an engine's, with columns of its own for what was billed."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = EndpointSpec.model_validate(spec)
        self.tokens = Tokens(open_store(self.spec.root), self.spec.tokenizer)
        self.pace = Pace(self.spec.requests_per_minute)
        self.life = uuid.uuid4().hex

    def ready(self) -> str:
        """Names this life of the actor."""
        return self.life

    def generate(
        self,
        model: dict[str, Any],
        conversations: list[list[dict[str, str]]],
        seeds: list[list[int]],
        *,
        temperature: float,
        top_p: float,
        max_tokens: int,
        logprobs: bool = False,
        best_tokens: int = 0,
        template_args: dict[str, Any] | None = None,
        spare: int = 0,
    ) -> pa.Table:
        """One response per conversation and seed, conversation-major, with an engine's columns. Text is null where no
        answer came; ``error`` says why. Token ids are the student's tokenizer's; prompt_tokens, completion_tokens and
        lost (tries) are what the endpoint bills, at most."""
        assert not logprobs, "an endpoint shows no distributions"
        assert not best_tokens, "an endpoint shows no distributions"
        asked = [(number, seed) for number, own in enumerate(seeds) for seed in own]
        limits = {"temperature": temperature, "top_p": top_p, self.spec.limit_field: max_tokens}
        bodies = []
        for number, seed in asked:
            body = {"model": self.spec.model, "messages": conversations[number], **limits, **self.spec.extra}
            bodies.append({**body, "seed": seed % (1 << 31)} if self.spec.send_seed and temperature > 0 else body)
        replies = asyncio.run(Round(self.spec, self.pace, spare, max_tokens).ask(bodies))
        prompts = [self.tokens.prompt(conversation, template_args or {}) for conversation in conversations]
        responses = [self.tokens.response(reply.text or "", reply.finish_reason) for reply in replies]
        rows = len(replies)
        return pa.table(
            {
                "conversation": pa.array([number for number, _ in asked], pa.int32()),
                "seed": pa.array([seed for _, seed in asked], pa.int64()),
                "prompt_token_ids": pa.array([prompts[number] for number, _ in asked], pa.list_(pa.int32())),
                "token_ids": pa.array(responses, pa.list_(pa.int32())),
                "text": pa.array([reply.text for reply in replies], pa.string()),
                "finish_reason": pa.array([reply.finish_reason for reply in replies], pa.string()),
                "logprob": pa.nulls(rows, pa.float32()),
                "token_logprobs": pa.nulls(rows, pa.list_(pa.float32())),
                "prompt_tokens": pa.array([reply.prompt_tokens for reply in replies], pa.int64()),
                "completion_tokens": pa.array([reply.completion_tokens for reply in replies], pa.int64()),
                "lost": pa.array([reply.lost for reply in replies], pa.int64()),
                "error": pa.array([reply.error for reply in replies], pa.string()),
                "outage": pa.array([reply.outage for reply in replies], pa.bool_()),
            }
        )


class Round:
    """Requests that are asked together. ``spare``: so many may be sent again though the lost one may be billed."""

    def __init__(self, spec: EndpointSpec, pace: Pace, spare: int, max_tokens: int) -> None:
        self.spec, self.pace, self.spare, self.max_tokens = spec, pace, spare, max_tokens
        self.turns = asyncio.Semaphore(spec.concurrency)
        self.fatal: Fault | None = None

    async def ask(self, bodies: list[dict[str, Any]]) -> list[Reply]:
        """A reply for each, in their order."""
        key = os.environ.get(self.spec.key_variable, "") if self.spec.key_variable else ""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(self.spec.timeout_seconds, connect=CONNECT_SECONDS)
        async with httpx.AsyncClient(base_url=self.spec.base_url, headers=headers, timeout=timeout) as client:
            return await asyncio.gather(*(self._answer(client, body) for body in bodies))

    async def _answer(self, client: httpx.AsyncClient, body: dict[str, Any]) -> Reply:
        billed = 0

        def another(error: BaseException) -> bool:
            """Whether one more try is allowed; a lost one that may be billed costs a spare."""
            nonlocal billed
            if not isinstance(error, Fault):
                return False
            billed += error.billed
            if error.fatal:
                self.fatal = error
            allowed = error.again and (not error.billed or self.spare > 0)
            self.spare -= allowed and error.billed
            return allowed

        most = longest(body["messages"], self.spec.template_tokens)
        tries = AsyncRetrying(
            stop=stop_after_attempt(self.spec.tries), wait=pause, retry=retry_if_exception(another), reraise=True
        )
        try:
            async with self.turns:
                answer: tuple[str, str | None, Any] = await tries(self._try, client, body)
        except Fault as fault:
            # The last try that may be billed is the request's own, and those before it were spare ones.
            took = (most, self.max_tokens) if billed else (0, 0)
            return Reply(None, None, *took, max(0, billed - 1), str(fault), fault.again or fault.fatal)
        text, ended, usage = answer
        took = (tokens(usage, "prompt_tokens", most), tokens(usage, "completion_tokens", self.max_tokens))
        return Reply(text, ended, *took, billed, None, False)

    async def _try(self, client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, str | None, Any]:
        if self.fatal:
            raise self.fatal
        await self.pace.turn()
        try:
            response = await client.post("chat/completions", json=body)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise Fault(f"no connection to {self.spec.base_url} ({type(error).__name__})", again=True) from None
        except httpx.HTTPError as error:
            raise Fault(
                f"{self.spec.base_url} did not answer ({type(error).__name__})", again=True, billed=True
            ) from None
        if response.status_code != 200:
            raise self._refusal(response)
        try:
            return answer_of(response.json())
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise Fault(f"{self.spec.base_url} answered without a choice", again=True, billed=True) from None

    def _refusal(self, response: httpx.Response) -> Fault:
        """What a status other than 200 means. Its body is not repeated: it may hold the prompt or a part of the key."""
        status, spec = response.status_code, self.spec
        if status in (401, 403):
            return Fault(f"{spec.base_url} refuses the key in {spec.key_variable} ({status})", fatal=True)
        if status == 404:
            return Fault(f"{spec.base_url} knows no model {spec.model!r} (404)", fatal=True)
        said = f"{spec.base_url} answered {status}"
        if status in (408, 429, 503):
            return Fault(said, again=True, pause=seconds(response.headers.get("Retry-After")))
        return Fault(said, again=status >= 500, billed=status >= 500)


def answer_of(reply: Any) -> tuple[str, str | None, Any]:
    """Text, why it ended, and what it says is billed. An error of Python's where a reply is none."""
    choice = reply["choices"][0]
    text, ended = choice["message"].get("content") or "", choice.get("finish_reason")
    if not isinstance(text, str) or not isinstance(ended, str | None):
        raise TypeError("a reply's text is text")
    # Half characters cannot be stored.
    return whole(text), ended and whole(ended), reply.get("usage")


def whole(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def tokens(usage: Any, name: str, most: int) -> int:
    """What is billed, as the endpoint says; the most it may be where it says nothing that can be."""
    said = usage.get(name) if isinstance(usage, dict) else None
    return said if isinstance(said, int) and not isinstance(said, bool) and 0 <= said < 1 << 31 else most


def seconds(retry_after: str | None) -> float:
    """Of a Retry-After header, not for ever; 0 where there is none, or a date."""
    try:
        return min(max(0.0, float(retry_after or 0)), LONGEST_PAUSE_SECONDS)
    except ValueError:
        return 0.0

"""A stage's progress in Prefect: one artifact, updated in place, and its words."""

import time
from contextlib import suppress
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from flows.artifacts import duration

UPDATE_SECONDS = 2.0


class StageProgress:
    """One stage's progress, updated in place, at most every two seconds."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.id: UUID | None = None
        self._at = 0.0
        self._first: tuple[float, float] | None = None  # when, and how much was done then
        self._last: dict[str, Any] | None = None

    def update(self, event: dict[str, Any]) -> None:
        self._first = self._first or (time.monotonic(), event["done"])
        self._last = event
        if time.monotonic() - self._at >= UPDATE_SECONDS:
            self._at = time.monotonic()
            # A server that is being restarted misses a figure; the run goes on.
            with suppress(httpx.HTTPError):
                self._write(event)

    def _write(self, event: dict[str, Any]) -> None:
        share = 100.0 * event["done"] / event["total"] if event["total"] else 0.0
        text = progress_text(event, self._time_left(event))
        if self.id is None:
            created = create_progress_artifact(share, key=f"progress-{self.stage}", description=text)
            assert isinstance(created, UUID)
            self.id = created
        else:
            update_progress_artifact(self.id, share, description=text)

    def _time_left(self, event: dict[str, Any]) -> float | None:
        """Seconds until all is done at the pace since the first figure; None while that is not known."""
        began, done = self._first or (0.0, 0.0)
        gained, left = event["done"] - done, event["total"] - event["done"]
        return (time.monotonic() - began) * left / gained if gained > 0 and left > 0 else None

    def close(self) -> None:
        """The last figure, which the rate limit may have held back."""
        if self._last is not None:
            with suppress(httpx.HTTPError):
                self._write(self._last)


def progress_text(event: dict[str, Any], seconds_left: float | None) -> str:
    """How far a stage is: rows, tokens, rate, time left, what the teacher was charged, and what retries took."""
    parts = [f"{event['done']:,g} of {event['total']:,g} {event['unit']}"]
    if event.get("tokens"):
        parts.append(f"{event['tokens']:,} tokens")
    if event.get("tokens_per_second"):
        parts.append(f"{event['tokens_per_second']:,g} tokens/s")
    if seconds_left is not None:
        parts.append(f"about {duration(seconds_left)} left")
    text = ", ".join(parts)
    if charged := event.get("charged"):
        again = {name: spent - charged[name] for name, spent in event["spent"].items() if name != "currency"}
        text += f"; teacher: {amount_text(charged)}"
        if again["queries"] > 0:
            text += f", and {amount_text(charged | again)} sent again"
        text += f"; left: {event['left']}"
    return text


def amount_text(amount: dict[str, Any]) -> str:
    """Queries, tokens and, where they have a price, money."""
    tokens = amount["prompt_tokens"] + amount["completion_tokens"]
    money = f", {amount['money']:,.4g} {amount['currency']}" if "money" in amount else ""
    return f"{amount['queries']:,} queries, {tokens:,} tokens{money}"

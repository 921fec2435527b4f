"""What a run leaves in Prefect: a progress artifact a stage, tables, a summary, the report's place."""

import base64
import time
from contextlib import suppress
from html import escape
from typing import Any
from uuid import UUID

import httpx
from prefect import task
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from flows.record import RunRecord, place
from infra.store import Store
from tasks.accounts import Account, accounts, costs, funnel
from tasks.config.budget import Budget

UPDATE_SECONDS = 2.0
BUDGET_COLUMNS = ("charged", "budget", "left", "sent", "at most")
LABELS = ("promoted", "base", "warmup", "final", "teacher")


def name_run(name: str) -> None:
    """Name this flow run by what it turned out to do."""
    with get_client(sync_client=True) as client:
        client.update_flow_run(flow_run.id, name=name)


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
    """How far a stage is: rows, tokens, rate, time left, and what the teacher was charged."""
    parts = [f"{event['done']:,g} of {event['total']:,g} {event['unit']}"]
    if event.get("tokens"):
        parts.append(f"{event['tokens']:,} tokens")
    if event.get("tokens_per_second"):
        parts.append(f"{event['tokens_per_second']:,g} tokens/s")
    if seconds_left is not None:
        parts.append(f"about {duration(seconds_left)} left")
    text = ", ".join(parts)
    if charged := event.get("charged"):
        tokens = charged["prompt_tokens"] + charged["completion_tokens"]
        money = f", {charged['money']:,.4g} {charged['currency']}" if "money" in charged else ""
        text += f"; teacher: {charged['queries']:,} queries, {tokens:,} tokens{money}; left: {event['left']}"
    return text


def duration(seconds: float) -> str:
    """Two significant places: an estimate pretends no more."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def interval(low_high: list[float] | None) -> str:
    return f"{low_high[0]:.2f} to {low_high[1]:.2f}" if low_high else ""


def metric_rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a model, in the order of the story."""
    rows = []
    for label in LABELS:
        if label in metrics:
            row: dict[str, Any] = {"model": label}
            for name in ("loss", "rouge_l", "accuracy"):
                value = metrics[label][name]
                row[name] = None if value is None else round(value, 4)
                row[f"{name} interval"] = interval(metrics[label][f"{name}_ci"])
            rows.append(row)
    return rows


def gate_lines(facts: dict[str, Any]) -> str:
    """Whether the student was promoted, and each condition, as Markdown. Names of tasks within are the data's."""
    checks = [f"- {'✓' if check['passed'] else '✗'} {shown(check['text'])}" for check in facts["gate"]]
    reason = f"**{'Promoted' if facts['promoted'] else 'Not promoted'}**: {shown(facts['reason'])}"
    return "\n".join([reason, "", *checks])


def shown(text: str) -> str:
    """Text within Markdown, which would take HTML."""
    return escape(text, quote=False)


def budget_rows(accounts: list[Account]) -> list[dict[str, Any]]:
    """One row a unit of the budget."""
    rows = []
    for account in accounts:
        values = (account.charged, account.cap, account.left, account.spent, account.spending_cap)
        rounded = [None if value is None else round(value, 6) for value in values]
        rows.append({"unit": account.unit, **dict(zip(BUDGET_COLUMNS, rounded, strict=True))})
    return rows


@task(name="publish", task_run_name="publish", cache_policy=NO_CACHE, persist_result=False)
def publish(record: RunRecord, store: Store) -> None:
    """The facts of a finished run as artifacts. A task's: on the flow run's page they stand below the flow's own, which
    is the summary alone, since artifacts of one level have no order there."""
    manifests = record.manifests(store)
    facts = manifests["report"].facts
    stages = [
        {
            "stage": stage.name,
            "seconds": round(stage.seconds, 1),
            "reused": stage.reused,
            "attempts": stage.attempts,
            "rows": sum(table.rows for table in manifests[stage.name].tables.values()),
            "fingerprint": stage.fingerprint,
        }
        for stage in record.stages
    ]
    create_table_artifact(table=stages, key="stages", description="Stages of this run")
    create_table_artifact(
        table=metric_rows(facts["metrics"]), key="metrics", description="Held-out metrics with intervals"
    )
    levels = [{"level": level.name, "rows": level.rows, "of the warm-up": level.warmup} for level in funnel(manifests)]
    create_table_artifact(table=levels, key="funnel", description="Where the rows went")
    create_table_artifact(
        table=[
            {"what": cost.title, "seconds": round(cost.seconds, 1), "teacher queries": cost.teacher_queries}
            | {"teacher tokens": cost.teacher_tokens, "tokens": cost.tokens}
            for cost in costs(manifests)
        ],
        key="spending",
        description="What each stage took: time, teacher queries, tokens",
    )
    budget = Budget.model_validate(record.config["budget"])
    create_table_artifact(
        table=budget_rows(accounts(manifests, budget)), key="budget", description="The teacher budget, charged and left"
    )
    report = store.location(facts["report"])
    link = report if "://" in report else f"file://{report}"
    create_link_artifact(link=link, link_text="Report", key="report", description="The run's report")
    # Within the artifact: a browser shows no picture of a folder, nor of a bucket that is not public.
    picture = base64.b64encode(store.read(facts["overview"])).decode()
    create_image_artifact(f"data:image/png;base64,{picture}", key="overview", description="The report's overview")


def summarise(record: RunRecord, store: Store) -> None:
    """What a finished run came to, on top of its flow run's artifacts."""
    facts = record.manifests(store)["report"].facts
    report, student = store.location(facts["report"]), place(store, facts["student"])
    create_markdown_artifact(
        f"# {record.run}\n\n{shown(facts['verdict'])}\n\n{gate_lines(facts)}\n\nReport: `{report}`\n\n"
        f"Student: `{student}`\n",
        key="summary",
        description="What this run did",
    )

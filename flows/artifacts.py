"""What a run leaves in Prefect at its end: tables, a summary, the report's place."""

import base64
import time
from collections.abc import Callable
from contextlib import suppress
from html import escape
from typing import Any

import httpx
from prefect import task
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows.compare import choices
from flows.record import RunRecord, place
from infra.store import Store
from tasks.accounts import Account, accounts, costs, funnel
from tasks.config.budget import Budget

# So long an artifact waits for a server that is being restarted, and so long between two tries.
AWAY_SECONDS, RETRY_SECONDS = 120.0, 2.0
BUDGET_COLUMNS = ("charged", "budget", "left", "sent", "at most")
LABELS = ("promoted", "base", "warmup", "final", "teacher")


def name_run(name: str) -> None:
    """Name this flow run by what it turned out to do."""
    with suppress(httpx.HTTPError), get_client(sync_client=True) as client:
        client.update_flow_run(flow_run.id, name=name)


def put(create: Callable[..., Any], **fields: Any) -> None:
    """Create an artifact. A server that is away is waited for; one that stays away misses it, for the run is done."""
    deadline = time.monotonic() + AWAY_SECONDS
    while True:
        try:
            create(**fields)
            return
        except httpx.HTTPError as error:
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
                raise
            if time.monotonic() > deadline:
                get_run_logger().warning("artifact %s is missing: Prefect's server does not answer", fields["key"])
                return
        time.sleep(RETRY_SECONDS)


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


def tidied(row: dict[str, Any]) -> dict[str, Any]:
    """A row for a reader: words for names, four places."""
    return {
        name.replace("_", " "): round(value, 4) if isinstance(value, float) else value for name, value in row.items()
    }


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
    levels = [{"level": level.name, "rows": level.rows, "of the warm-up": level.warmup} for level in funnel(manifests)]
    spending = [
        {"what": cost.title, "seconds": round(cost.seconds, 1), "teacher queries": cost.teacher_queries}
        | {"teacher tokens": cost.teacher_tokens, "tokens": cost.tokens}
        for cost in costs(manifests)
    ]
    budget = budget_rows(accounts(manifests, Budget.model_validate(record.config["budget"])))
    for key, table, description in (
        ("stages", stages, "Stages of this run"),
        ("metrics", metric_rows(facts["metrics"]), "Held-out metrics with intervals"),
        ("funnel", levels, "Where the rows went"),
        ("signals", [tidied(row) for row in choices(store, record)], "What each signal would have selected"),
        ("spending", spending, "What each stage took: time, teacher queries, tokens"),
        ("budget", budget, "The teacher budget, charged and left"),
    ):
        put(create_table_artifact, table=table, key=key, description=description)
    report = store.location(facts["report"])
    link = report if "://" in report else f"file://{report}"
    put(create_link_artifact, link=link, link_text="Report", key="report", description="The run's report")
    # Within the artifact: a browser shows no picture of a folder, nor of a bucket that is not public.
    picture = base64.b64encode(store.read(facts["overview"])).decode()
    image = f"data:image/png;base64,{picture}"
    put(create_image_artifact, image_url=image, key="overview", description="The report's overview")


def summarise(record: RunRecord, store: Store) -> None:
    """What a finished run came to, on top of its flow run's artifacts."""
    facts = record.manifests(store)["report"].facts
    report, student = store.location(facts["report"]), place(store, facts["student"])
    put(
        create_markdown_artifact,
        markdown=f"# {record.run}\n\n{shown(facts['verdict'])}\n\n{gate_lines(facts)}\n\nReport: `{report}`\n\n"
        f"Student: `{student}`\n",
        key="summary",
        description="What this run did",
    )

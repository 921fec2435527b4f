"""Promotions as Prefect events, and an automation that calls a webhook for each.

    python -m flows.notify https://hooks.slack.com/services/…

The automation stands at the server of PREFECT_API_URL, or of ``switchyard up``; that server calls the address.
"""

import argparse
import os
from pathlib import Path
from typing import Any
from uuid import UUID

from flows.local import running_local
from infra.store import Store
from tasks.promoted import Promotion

EVENT = "switchyard.student.promoted"
FLUSH_SECONDS = 10.0
# Slack, Mattermost, Teams and others show the field ``text``; ``tojson`` quotes whatever stands in it.
PAYLOAD = '{"text": {{ event.payload.text | tojson }}, "promotion": {{ event.payload | tojson }}}'


def announce(promotion: Promotion, store: Store) -> None:
    """Emit the event of a promotion. Sent in the background: ``flush`` waits for it."""
    from prefect.events import emit_event

    report, student = store.location(promotion.report), store.location(promotion.student)
    emit_event(
        EVENT,
        resource={
            "prefect.resource.id": f"switchyard.student.{promotion.name}",
            "prefect.resource.name": promotion.name,
        },
        payload={
            "text": f"{promotion.name}: a new student is promoted. {promotion.verdict} {promotion.reason}. {report}",
            "name": promotion.name,
            "number": promotion.number,
            "run": promotion.run,
            "student": student,
            "report": report,
            "reason": promotion.reason,
        },
    )


def flush() -> None:
    """Wait until all events of this process are sent, but not for a server that is gone."""
    from prefect.events.worker import EventsWorker

    EventsWorker.drain_all(timeout=FLUSH_SECONDS)


def webhook_on_promotion(url: str, pipeline: str = "*") -> UUID:
    """Have the server call ``url`` whenever a student of the pipeline is promoted; the automation's id. The address is
    kept as a secret of a Webhook block. Doing it again replaces it."""
    from prefect.automations import Automation
    from prefect.blocks.webhook import Webhook
    from prefect.events.actions import CallWebhook
    from prefect.events.schemas.automations import EventTrigger, Posture

    name = "all" if pipeline == "*" else pipeline
    block = Webhook.model_validate({"url": url, "headers": {"Content-Type": "application/json"}})
    document: Any = block.save(f"switchyard-promotions-{name}", overwrite=True)
    automation: Any = Automation(
        name=f"switchyard promotions of {name}",
        description="Calls a webhook for every promoted student",
        trigger=EventTrigger(
            expect={EVENT},
            match={"prefect.resource.id": f"switchyard.student.{pipeline}"},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[CallWebhook(block_document_id=document, payload=PAYLOAD)],
    )
    try:
        known: Any = Automation.read(name=automation.name)
    except ValueError:
        return UUID(str(automation.create().id))
    automation.id = known.id
    automation.update()
    return UUID(str(automation.id))


def main() -> None:
    parser = argparse.ArgumentParser(description="Call a webhook for every promoted student.")
    parser.add_argument("url", help="where to post; kept as a secret in Prefect")
    parser.add_argument("--name", default="*", help="only of this pipeline")
    arguments = parser.parse_args()
    up = running_local()
    if up and "PREFECT_API_URL" not in os.environ:
        from flows.server import environment

        os.environ.update(environment(Path(up.home), up.prefect_url))
    print(f"automation {webhook_on_promotion(arguments.url, arguments.name)}")


if __name__ == "__main__":
    main()

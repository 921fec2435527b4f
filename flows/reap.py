"""Reaping: what a run leaves behind where nobody was left to end it.

A flow's process tells Prefect every half minute that it lives (PREFECT_FLOWS_HEARTBEAT_FREQUENCY), and renews its run's
lease in the store every ten seconds. A flow run that fell silent is a zombie: it becomes Crashed, so that it no longer
holds its place in a queue. A Ray job whose lease stands still is an orphan: it is stopped.

Deployed as ``reap``, once an hour.
"""

import time
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.events.filters import EventFilter, EventNameFilter, EventOrder, EventResourceFilter
from prefect.states import Cancelled, Crashed
from pydantic import Field

from flows.local import running_local
from infra.cluster import Cluster, running_jobs, stop_jobs
from infra.lease import lease_counter, lease_path
from infra.store import open_store

BEAT = "prefect.flow-run.heartbeat"


@flow(name="reap", log_prints=False)
def reap(
    silent_minutes: Annotated[float, Field(ge=1.5)] = 5.0,
    watch_seconds: Annotated[float, Field(ge=15)] = 30.0,
    ray_address: str | None = None,
) -> Any:
    """End what no process looks after any more: flow runs that fell silent, Ray jobs whose lease stands still.

    Args:
        silent_minutes: A flow run without a sign of life for so many minutes is marked Crashed (at least 1.5).
        watch_seconds: So long a lease has to stand still (at least 15; a living run renews it every 10).
        ray_address: The cluster to look at (http://…:8265); absent: the one of ``switchyard up``, if it runs.
    """
    found = [*zombies(timedelta(minutes=silent_minutes)), *orphans(ray_address, watch_seconds)]
    create_table_artifact(found, key="reaped", description=f"{len(found)} ended")
    return found


def zombies(silence: timedelta) -> list[dict[str, str]]:
    """Mark flow runs that beat once and no more. Those that never beat are other programs', and left alone."""
    ended = []
    live = {"state": {"type": {"any_": ["RUNNING", "CANCELLING"]}}}
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(live)):
            beat = last_beat(client, run)
            if beat is None or datetime.now(UTC) - beat < silence:
                continue
            assert run.state is not None
            since = f"no sign of life since {beat:%Y-%m-%d %H:%M:%S} UTC"
            state = Cancelled(message=since) if run.state.is_cancelling() else Crashed(message=since)
            client.set_flow_run_state(run.id, state, force=True)
            get_run_logger().warning("flow run %s: %s", run.name, since)
            ended.append({"what": "flow run", "name": run.name, "why": since})
    return ended


def last_beat(client: Any, run: FlowRun) -> datetime | None:
    """When the flow run's process last told that it lives."""
    wanted = EventFilter(
        event=EventNameFilter(name=[BEAT]),
        resource=EventResourceFilter(id=[f"prefect.flow-run.{run.id}"]),
        order=EventOrder.DESC,
    )
    events = client.read_events(filter=wanted, limit=1).events
    return events[0].occurred if events else None


def orphans(address: str | None, seconds: float) -> list[dict[str, str]]:
    """Stop jobs of runs whose lease did not change for so long. Two looks, by no clock but this process's own."""
    up = running_local()
    address = address or (up.ray_address if up else None)
    if address is None:
        return []
    cluster = Cluster(address)
    first = leases(cluster)
    if not first:
        return []
    time.sleep(seconds)
    still = {job for job, lease in leases(cluster).items() if first.get(job) == lease}
    stop_jobs(cluster, still)
    why = f"its run's lease stood still for {seconds:g} s"
    for job in sorted(still):
        get_run_logger().warning("Ray job %s: %s", job, why)
    return [{"what": "Ray job", "name": job, "why": why} for job in sorted(still)]


def leases(cluster: Cluster) -> dict[str, bytes]:
    """The lease of every running job that belongs to a run."""
    known = {job: (data["root"], data["run"]) for job, data in running_jobs(cluster).items() if "root" in data}
    return {job: lease_counter(open_store(root), lease_path(run)) for job, (root, run) in known.items()}

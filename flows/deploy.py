"""The deployments of prefect.yaml that run on this machine, put on the server of this process's settings.

What ``switchyard up`` does; ``prefect --no-prompt deploy --all`` does the same for every pool.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.exceptions import ObjectAlreadyExists
from prefect.flows import load_flow_from_entrypoint
from prefect.schedules import Schedule
from prefect.types.entrypoint import EntrypointType
from prefect.workers.process import ProcessWorker

from flows.gpus import gpus_here
from flows.local import POOL
from flows.slots import make_slots

FILE = Path(__file__).parent.parent / "prefect.yaml"


def deploy_local() -> list[str]:
    """Put them there, or bring them up to date; returns their names."""
    make_pool()
    said = yaml.safe_load(FILE.read_text())
    (slots,) = (step["flows.slots.make_slots"] for step in said["build"])
    make_slots(**slots | ({"limit": gpus_here()} if gpus_here() else {}))
    return [put(entry) for entry in said["deployments"] if entry["work_pool"]["name"] == POOL]


def make_pool() -> None:
    pool = WorkPoolCreate(
        name=POOL, type=ProcessWorker.type, base_job_template=ProcessWorker.get_default_base_job_template()
    )
    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        client.create_work_pool(pool)


def put(entry: dict[str, Any]) -> str:
    deployment: Any = load_flow_from_entrypoint(entry["entrypoint"]).to_deployment(
        name=entry["name"],
        version=entry["version"],
        tags=entry["tags"],
        description=entry["description"],
        parameters=entry.get("parameters"),
        concurrency_limit=ConcurrencyLimitConfig(**entry["concurrency_limit"]),
        schedules=[Schedule(**schedule) for schedule in entry.get("schedules", [])],
        job_variables={"working_dir": str(FILE.parent)},
        work_pool_name=POOL,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    deployment.apply()
    return str(entry["name"])

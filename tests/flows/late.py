"""A flow whose one stage is late at first, on a Prefect server and a Ray head of its own. Run by ``test_deadline``:
Prefect reads its settings when it is imported, so the server comes first.

python tests/flows/late.py FOLDER
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from flows.server import EmbeddedServer
from tasks.config import load_config

HERE = Path(__file__).parent
# Nothing here needs engines.
RESOURCES = ["resources.stage_deadline_minutes=1", "resources.retry_late_stages=true", "resources.engine_room=none"]


def task_of(folder: Path) -> dict[str, Any]:
    """The stage's task as Prefect's server knows it, and what the run's record says."""
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.runtime import flow_run

    from flows.runner import Runner

    config = load_config(HERE.parent.parent / "configs" / "quickstart.yaml", RESOURCES)

    @flow(name="late", validate_parameters=False)
    def late() -> dict[str, Any]:
        with Runner.open(config, str(folder / "root")) as runner:
            runner.stage("late", "late_stage", {})
            mine = FlowRunFilter.model_validate({"id": {"any_": [flow_run.id]}})
            with get_client(sync_client=True) as client:
                # Tasks tell the server their states a moment later.
                while not (found := client.read_task_runs(flow_run_filter=mine)) or not found[0].state.is_final():
                    time.sleep(0.5)
            (task,) = found
            state = {"name": task.name, "state": task.state.name, "message": task.state.message}
            return state | {"attempts": runner.record.stages[-1].attempts}

    return late()


if __name__ == "__main__":
    server = EmbeddedServer(Path(sys.argv[1]) / "prefect")
    server.start()
    try:
        server.wait()
        print(json.dumps(task_of(Path(sys.argv[1]))))
    finally:
        server.stop()

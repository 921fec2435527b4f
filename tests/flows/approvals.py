"""A flow that spends, on a Prefect server of its own: approved, declined, cancelled, and in vain. Run by
``test_approval``: Prefect reads its settings when it is imported, so the server comes first.

python tests/flows/approvals.py FOLDER
"""

import json
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from flows.server import EmbeddedServer
from tasks.config.budget import Budget

BUDGET = {"queries": 500, "price": {"input": 1, "output": 2}, "money": 40}
MOST = {"queries": 100, "money": 50}


def outcomes() -> dict[str, Any]:
    """By case: what became of the flow, what the person was told, and seconds."""
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.exceptions import Abort
    from prefect.flow_runs import resume_flow_run
    from prefect.runtime import flow_run
    from prefect.states import Cancelled

    from flows.approval import above, wait_for_approval
    from flows.ends import StageCancelled, StageRefused

    runs: dict[str, Any] = {}
    told: dict[str, str] = {}
    found: dict[str, str] = {}

    @flow(name="spends")
    def spends(case: str, hours: float) -> None:
        runs[case] = flow_run.id
        budget = Budget.model_validate({**BUDGET, "approve_above": {**MOST, "wait_hours": hours}})
        try:
            wait_for_approval(above(budget), budget)
            found[case] = "spent"
        except (StageRefused, StageCancelled) as error:
            found[case] = str(error)

    def person(case: str) -> None:
        """Waits until the run is paused, then does as the case says."""
        with get_client(sync_client=True) as client:
            while case not in runs or not client.read_flow_run(runs[case]).state.is_paused():
                time.sleep(0.1)
            told[case] = client.read_flow_run_input(runs[case], "paused-approval-description")
            if case == "cancelled":
                client.set_flow_run_state(runs[case], Cancelled(), force=True)
            elif case != "in vain":
                resume_flow_run(runs[case], run_input={"approve": case == "approved"})

    for case, hours in (("approved", 1.0), ("declined", 1.0), ("cancelled", 1.0), ("in vain", 3 / 3600)):
        threading.Thread(target=person, args=(case,), daemon=True).start()
        # A run that was cancelled has its last state already: the server accepts no other.
        with suppress(Abort):
            spends(case, hours, return_state=True)
    return {"came of it": found, "told": told}


if __name__ == "__main__":
    server = EmbeddedServer(Path(sys.argv[1]) / "prefect")
    server.start()
    try:
        server.wait()
        print(json.dumps(outcomes()))
    finally:
        server.stop()

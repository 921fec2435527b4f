"""Approval: a run whose budget is above ``budget.approve_above`` waits, paused in Prefect, until a person agrees.

A flow that a worker runs, or a person at a terminal, waits there; the form says what would be spent. ``switchyard run``
without a terminal cannot wait for anybody: it takes ``--yes``, or refuses. An agreement is kept in the run's record, so
a run that is continued does not ask again; one that is told to annotate anew, or may send more again, does.
"""

import time
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.input import RunInput
from prefect.input.run_input import keyset_from_paused_state
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Paused
from prefect.utilities.urls import url_for

from flows.display import display
from flows.ends import StageCancelled, StageRefused
from flows.record import RunRecord
from tasks.config.budget import Budget

POLL_SECONDS = 1.0


class Agreement(RunInput):
    """The form in Prefect."""

    approve: bool = False


def above(budget: Budget) -> str:
    """What of the budget is above the amounts that need approval, in words; empty where nothing is."""
    most = budget.approve_above
    if most is None:
        return ""
    unit = budget.price.currency if budget.price else ""
    amounts = [
        (f"{budget.queries:,} queries", most.queries is not None and budget.queries > most.queries),
        (f"{budget.tokens:,} tokens" if budget.tokens else "tokens without a cap", over(budget.tokens, most.tokens)),
        (f"{budget.money:,g} {unit}" if budget.money else "money without a cap", over(budget.money, most.money)),
    ]
    return " and ".join(text for text, exceeds in amounts if exceeds)


def agreed(known: RunRecord | None, budget: Budget) -> bool:
    """Whether somebody agreed to what a run that is continued spends; to more than was asked of them they did not."""
    return known is not None and known.approved and budget.spending_factor <= known.config["budget"]["spending_factor"]


def over(cap: float | None, most: float | None) -> bool:
    """Whether a cap may be spent beyond what needs no approval; what has no cap may."""
    return most is not None and (cap is None or cap > most)


def wait_for_approval(what: str, budget: Budget) -> None:
    """Pause the flow run until a person agrees. StageRefused where they decline or nobody comes, StageCancelled where
    the run is cancelled meanwhile. Prefect's own ``pause_flow_run`` would not notice that."""
    assert budget.approve_above is not None
    hours, place = budget.approve_above.wait_hours, url_for("flow-run", obj_id=flow_run.id) or "Prefect's UI"
    text = (
        f"This run would spend {what} on the teacher, and {budget.spending_factor:g} times as much at most where "
        "requests have to be sent again. Tick approve to go on; without it the run ends."
    )
    form = Agreement.with_initial_data(description=text)
    paused: State[Any] = Paused(timeout_seconds=int(3600 * hours), pause_key="approval")
    keys = keyset_from_paused_state(paused)
    paused.state_details.run_input_keyset = {str(kind): key for kind, key in keys.items()}
    display().notice(f"waiting for approval of {what}: resume the run at {place}")
    get_run_logger().warning("waiting for approval of %s", what)
    deadline = time.monotonic() + 3600 * hours
    with get_client(sync_client=True) as client:
        form.save(keys)
        client.set_flow_run_state(flow_run.id, paused)
        while (state := client.read_flow_run(flow_run.id).state) is None or not state.is_running():
            if state is not None and (state.is_cancelling() or state.is_cancelled()):
                raise StageCancelled("cancelled from Prefect while it waited for approval")
            if time.monotonic() > deadline or (state is not None and state.is_final()):
                raise StageRefused(f"budget.approve_above: nobody approved {what} within {hours:g} hours: run it again")
            time.sleep(POLL_SECONDS)
        agreement = form.load(keys)
        assert isinstance(agreement, Agreement)  # a client that is not asynchronous answers at once
        if not agreement.approve:
            raise StageRefused(f"budget.approve_above: {what} were declined in Prefect: lower the budget")
    get_run_logger().info("%s approved", what)

"""How a stage, and with it its run, may end other than well; and the state that Prefect is told."""

from typing import Any

from prefect import State
from prefect.states import Cancelled, Failed

from infra.faults import fault_of
from infra.manifest import DamagedError


class StageCancelled(Exception):
    """The flow run was cancelled while a stage ran."""


class StageFailed(Exception):
    """A stage ended without a manifest. The message is its cause in one line."""


class StageDamaged(StageFailed):
    """A stage read a part that is not as it was committed. It is forgotten; following the story again makes it anew."""


class StageRefused(StageFailed):
    """A stage said why it cannot go on: a user's mistake that no second attempt mends."""


def end_of(error: Exception) -> State[Any]:
    """The state of a flow that ended of this, its cause in one line. An error that nobody foresaw is raised again."""
    if isinstance(error, StageCancelled):
        return Cancelled(message=str(error))
    if isinstance(error, StageFailed | DamagedError):
        return Failed(message=str(error))
    fault = fault_of(error)
    if fault is None:
        raise error
    return Failed(message=fault.line)

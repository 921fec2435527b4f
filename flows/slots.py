"""GPU slots: a global concurrency limit in Prefect, one slot a GPU, shared by all runs of its server.

A run takes as many slots as it has GPUs at work at once, when its first stage that needs GPUs begins, and gives them
back when it ends: its engines stay loaded between stages. It takes all at once or waits for all, so that runs never
wait for each other with half of what they need; who waits asks every two seconds, and whoever asks first when slots
fall free gets them. A run that is reused whole, one on CPU, and one on a server without the limit take none. Slots of
a process that died fall free after five minutes.

The limit is made with the deployments (``prefect.yaml``); ``prefect gcl update NAME --limit N`` changes it.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.logging import get_run_logger

from flows.display import display
from flows.ends import StageRefused
from flows.watch import check_cancelled

POLL_SECONDS = 2.0
# Modules of stages that ask engines or train.
AT_WORK = ("tasks.sample", "tasks.review", "tasks.keep", "tasks.select", "tasks.train", "tasks.evaluate")


def make_slots(name: str, limit: int) -> None:
    """Make the limit; one that is there already stays as somebody has set it. A build step of ``prefect.yaml``."""
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            with suppress(ObjectAlreadyExists):
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=limit))


@contextmanager
def held(name: str, count: int) -> Iterator[None]:
    """Hold so many slots while the context lasts, once they are free. StageRefused where the limit is lower,
    StageCancelled where the run is cancelled while it waits."""
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            yield
            return
    if limit.active and limit.limit < count:
        raise StageRefused(
            f"resources.gpu_slots: the run needs {count} GPUs at once, {name} has {limit.limit} slots: use fewer "
            f"engines or workers, or raise it (prefect gcl update {name} --limit {count})"
        )
    slots = taken(name, count)
    if slots is None:
        display().notice(f"waiting for {count} of the {limit.limit} GPU slots of {name}")
        get_run_logger().info("waiting for %d of the %d GPU slots of %s", count, limit.limit, name)
    while slots is None:
        check_cancelled()
        slots = taken(name, count)
    try:
        yield
    finally:
        # A server that is gone gives them back by itself.
        with suppress(httpx.HTTPError):
            slots.__exit__(None, None, None)


def taken(name: str, count: int) -> AbstractContextManager[None] | None:
    """The slots, entered; None where they are not free, or the server is being restarted."""
    slots = concurrency(name, occupy=count, timeout_seconds=POLL_SECONDS)
    try:
        slots.__enter__()
    except TimeoutError:
        return None
    except ConcurrencySlotAcquisitionError as error:
        if not isinstance(error.__cause__, httpx.TransportError):
            raise
        return None
    return slots

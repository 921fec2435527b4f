"""A stage's connection to Ray: the run's cluster inside a job, a small Ray of its own where a stage runs alone."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from tasks.stage import Runtime


@contextmanager
def connected(runtime: Runtime) -> Iterator[None]:
    """Ray, for the time of the block: the one already in use, the cluster of a job (``RAY_ADDRESS``), or an own one."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Workers' output stays in Ray's log files; what this process prints is the stage's log.
    quiet = {"log_to_driver": False, "logging_level": logging.WARNING, "namespace": runtime.namespace}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto", **quiet)
    else:
        cpus = max(os.cpu_count() or 1, runtime.workers)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()

"""The Ray cluster: a head on this machine, or one that runs already, and jobs on either, through the Jobs API."""

import asyncio
import logging
import os
import queue
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from infra.process import Guarded
from infra.terminal import visible

START_SECONDS = 120.0
# How long a tail takes to notice that its job ended, at most.
TAIL_SECONDS = 5.0
# Ray's own processes take longer than anybody waits to end by themselves, and nothing on a run's own head is lost.
HEAD_GRACE = 0.5
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    # One run, one cluster: nothing profits from the metrics of every worker.
    "RAY_enable_metrics_collection": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Idle OpenMP threads sleep instead of spinning: engines, trainer and services share cores, and spinning threads of
    # one slow the others several times over.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
}
FINAL = {"SUCCEEDED", "FAILED", "STOPPED", "LOST"}
# What a head says of its node's agent, which starts jobs, until that is there; and where it did not get its answer:
# a job that was started nevertheless is found under its id when it is submitted again.
UNREADY = ("No available agent", "Server disconnected", "Cannot connect to host")
LOG_LOST = "(log connection lost)"


def free_port(wanted: int = 0) -> int:
    """A port on loopback that nobody listens on: the one that is wanted, if it is free."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@cache
def token_environment() -> dict[str, str]:
    """Ray's token authentication with a secret of this process, for all heads that it starts: Ray reads it once. Child
    processes inherit it; it stands on no command line."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def head_command(dashboard_port: int, folder: Path, gcs_port: int) -> list[str]:
    """``ray start`` for a head on loopback with every port of its own, so that several fit on one machine."""
    return [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        "--include-dashboard=true",
        "--dashboard-host=127.0.0.1",
        "--node-ip-address=127.0.0.1",
        f"--port={gcs_port}",
        f"--dashboard-port={dashboard_port}",
        f"--dashboard-agent-listen-port={free_port()}",
        f"--ray-client-server-port={free_port()}",
        f"--temp-dir={folder}",
        f"--num-cpus={max(2, os.cpu_count() or 1)}",
    ]


class Cluster:
    """Jobs on a Ray cluster. Without an address a head is started here, on first use, and ended by ``close``.
    ``waiting`` is called again and again while it is not ready; what it raises ends the wait."""

    def __init__(self, address: str | None = None, waiting: Callable[[], Any] = lambda: None) -> None:
        self.address, self.waiting = address, waiting
        self.own = address is None
        self._head: Guarded | None = None
        self._folder: Path | None = None
        self._client: Any = None
        self._lock = threading.Lock()

    @property
    def on_this_machine(self) -> bool:
        """Whether jobs run with this machine's interpreter and files."""
        return self.own or urlparse(self.address).hostname in ("127.0.0.1", "localhost", "::1")

    @property
    def started(self) -> bool:
        return self._client is not None

    @property
    def ended(self) -> bool:
        """Whether a head was started here and is gone."""
        return self._head is not None and not self._head.alive

    @property
    def client(self) -> Any:
        """Ray's ``JobSubmissionClient``, once the cluster answers."""
        with self._lock:
            if self._client is None:
                self._client = self._connect()
            return self._client

    def _connect(self) -> Any:
        if self.own:
            port = free_port()
            # Unix socket paths are short: the folder cannot lie below an arbitrary root.
            self._folder = Path(tempfile.mkdtemp(prefix="switchyard-ray-", dir="/tmp"))
            # Ray's own ports listen beyond loopback: nobody without this head's token gets a job onto it. The client
            # below and the jobs read it from the environment.
            os.environ.update(token_environment())
            head, log = head_command(port, self._folder, free_port()), self._folder / "head.log"
            self._head = Guarded(head, log, QUIET, grace=HEAD_GRACE)
            self.address = f"http://127.0.0.1:{port}"
        # Ray reads its authentication from the environment when it is imported.
        from ray.job_submission import JobSubmissionClient

        # It says at every job's end that its log was read to the end.
        logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                client = JobSubmissionClient(self.address)
                client.list_jobs()
                return client
            except (ConnectionError, RuntimeError) as error:
                if self._head and not self._head.alive:
                    raise RuntimeError(f"Ray head ended while starting: {self._head.tail()}") from None
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no Ray job server at {self.address}: {error}") from None
                self.waiting()
                time.sleep(0.3)

    def close(self) -> None:
        """End the head that this object started, with every process of its cluster."""
        if self._head:
            self._head.stop()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._head = self._client = None


def brief(error: Exception) -> str:
    """What a job server's client says, in a line."""
    return " ".join(str(error).split())[:200]


class Job:
    """One submitted job: its state and its log lines."""

    def __init__(self, cluster: Cluster, job_id: str) -> None:
        self.cluster, self.id = cluster, job_id
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._given = 0  # lines of the log that were handed out
        self._tail = threading.Thread(target=self._follow, daemon=True, name=f"tail-{job_id}")
        self._tail.start()

    def _follow(self) -> None:
        async def follow() -> None:
            rest = ""
            async for chunk in self.cluster.client.tail_job_logs(self.id):
                *lines, rest = (rest + chunk).split("\n")
                for line in lines:
                    self._lines.put(line)
            if rest:
                self._lines.put(rest)

        try:
            asyncio.run(follow())
        except Exception:
            # The log is a courtesy: a lost connection, by whatever name, must not end a job that goes on.
            self._lines.put(LOG_LOST)

    def lines(self) -> Iterator[str]:
        """Lines written since the last call, as Ray's tail brings them: a second or two late. What a terminal would act
        on is written out: others than ours print here too."""
        with suppress(queue.Empty):
            while True:
                line = self._lines.get_nowait()
                self._given += line != LOG_LOST
                yield visible(line)

    def rest(self) -> Iterator[str]:
        """The remaining lines of an ended job. Its tail looks for news and for the job's end every other second, so the
        log is read again instead."""
        try:
            written = self.cluster.client.get_job_logs(self.id)
        except (OSError, RuntimeError):
            self._tail.join(TAIL_SECONDS)
            yield from self.lines()
            return
        yield from map(visible, written.removesuffix("\n").split("\n")[self._given :])

    @property
    def status(self) -> str:
        """Ray's word for it; LOST where the head does not know it, since it was started anew. ConnectionError where
        nobody answers."""
        try:
            return str(self.cluster.client.get_job_status(self.id).value)
        except RuntimeError as error:
            if "does not exist" in str(error):
                return "LOST"
            raise ConnectionError(brief(error)) from None
        except OSError as error:
            # What the client's own library raises is none of Python's ConnectionErrors.
            raise ConnectionError(brief(error)) from None


def submit(cluster: Cluster, job_id: str, command: str, environment: dict[str, str], metadata: dict[str, str]) -> Job:
    """Submit a command as a job; a job of that id that runs with the same metadata is adopted instead.

    Raises ValueError where the id is taken by a job that ended or is another's: the caller takes its next attempt.
    """
    client, deadline = cluster.client, time.monotonic() + START_SECONDS
    while True:
        try:
            client.submit_job(
                entrypoint=command,
                submission_id=job_id,
                # Drivers are light; what needs CPUs or GPUs asks for them itself.
                entrypoint_num_cpus=0,
                runtime_env={"env_vars": environment},
                metadata=metadata,
            )
            return Job(cluster, job_id)
        except RuntimeError as error:
            if "already exists" in str(error):
                break
            if not any(text in str(error) for text in UNREADY) or time.monotonic() > deadline:
                raise
            cluster.waiting()
            time.sleep(0.3)
    info = client.get_job_info(job_id)
    if info.metadata != metadata or str(info.status.value) in FINAL:
        raise ValueError(f"job {job_id} exists and is {info.status.value}")
    return Job(cluster, job_id)


def running_jobs(cluster: Cluster) -> dict[str, dict[str, str]]:
    """Metadata of the submitted jobs that have not ended, by id."""
    jobs = [job for job in cluster.client.list_jobs() if job.submission_id and str(job.status.value) not in FINAL]
    return {job.submission_id: job.metadata or {} for job in jobs}


def stop_jobs(cluster: Cluster, ids: Iterable[str], seconds: float = 15.0) -> None:
    """Stop jobs at once, and wait until all have ended."""
    waiting = set(ids)
    for job in waiting:
        cluster.client.stop_job(job)
    deadline = time.monotonic() + seconds
    while waiting & running_jobs(cluster).keys() and time.monotonic() < deadline:
        time.sleep(0.2)

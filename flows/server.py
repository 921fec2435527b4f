"""Prefect's own server on loopback, started beside a run and ended with it."""

import os
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from infra.cluster import free_port
from infra.process import Guarded

START_SECONDS = 180.0
STARTS = 3
LOOK_SECONDS = 1.0


def environment(home: Path, url: str | None = None) -> dict[str, str]:
    """Of every process that talks to this server, or is it."""
    settings = {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_CLI_PROMPT": "false",
        # A run tells every half minute that it lives; `flows/reap.py` marks those that fell silent.
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        # So long a run that was started from the UI waits for its worker to look, at most.
        "PREFECT_WORKER_QUERY_SECONDS": "3",
        "DO_NOT_TRACK": "1",
    }
    return {**settings, "PREFECT_API_URL": url} if url else settings


def server_environment(home: Path, url: str) -> dict[str, str]:
    """Of the server itself. Its pages have to be told where it is: they would look at Prefect's own port."""
    quiet = {"PREFECT_API_URL": "", "PREFECT_LOGGING_SERVER_LEVEL": "WARNING", "PREFECT_SERVER_DATABASE_TIMEOUT": "60"}
    return {**environment(home), **quiet, "PREFECT_SERVER_UI_API_URL": url}


def server_command(port: int) -> list[str]:
    return [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


class ServerFailed(RuntimeError):
    """A server that a command needs does not come up, or is too busy; one line."""


class EmbeddedServer:
    """A server of one run: SQLite below ``home``. ``start`` returns at once; ``wait`` when it answers. From then on one
    that dies is started again at the same address: Prefect's client repeats what it could not say."""

    def __init__(self, home: Path) -> None:
        self.home = home.absolute()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self._process: Guarded | None = None
        self._over = threading.Event()
        self._reviver = threading.Thread(target=self._revive, daemon=True, name="prefect-server")

    def start(self) -> None:
        # Read by Prefect when it is imported, in this process and in every child.
        os.environ.update(environment(self.home, self.url))
        self._spawn()

    def _spawn(self) -> None:
        own = server_environment(self.home, self.url)
        self._process = Guarded(server_command(self.port), self.home / "server.log", own)

    def _revive(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            if self._process and not self._process.alive:
                self._spawn()

    def wait(self) -> None:
        """Return when it answers. ServerFailed where it ends in all its starts, or is too slow."""
        assert self._process is not None
        deadline, starts = time.monotonic() + START_SECONDS, 1
        while not answers(self.url):
            if not self._process.alive and starts == STARTS:
                said = " ".join(self._process.tail().split())
                raise ServerFailed(f"Prefect's server ended in {STARTS} starts ({said}): see {self._process.log}")
            if not self._process.alive:
                starts += 1
                self._spawn()
            if time.monotonic() > deadline:
                raise ServerFailed(
                    f"Prefect's server did not answer within {START_SECONDS:.0f} s: see {self._process.log}"
                )
            time.sleep(0.2)
        if not self._reviver.is_alive():
            self._reviver.start()

    def stop(self) -> None:
        self._over.set()
        if self._reviver.is_alive():
            self._reviver.join()
        if self._process:
            self._process.stop()
            self._process = None

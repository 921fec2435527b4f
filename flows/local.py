"""What ``switchyard up`` starts and ``down`` ends: Prefect's server with its deployments, a worker and a Ray head on
loopback."""

import os
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlparse

import httpx
import psutil
from pydantic import BaseModel, ValidationError

from flows.server import ServerFailed, answers, environment, server_command, server_environment
from infra.cluster import QUIET, free_port, head_command, token_environment
from infra.process import detached, end, marked
from tasks.config import RunConfig

POOL = "switchyard"
START_SECONDS = 180.0


def home() -> Path:
    """Where this machine's servers keep their state; SWITCHYARD_HOME moves it."""
    return Path(os.environ.get("SWITCHYARD_HOME", Path.home() / ".switchyard"))


class Local(BaseModel):
    """The addresses of running servers, and the token that marks their processes."""

    token: str
    home: str
    prefect_url: str
    ray_address: str
    ray_folder: str
    ray_environment: dict[str, str]

    @classmethod
    def start(cls) -> "Local":
        """Start what is not up; returns when everything answers."""
        known = running_local()
        local = known or cls(
            token=uuid.uuid4().hex,
            home=str(home() / "prefect"),
            prefect_url=f"http://127.0.0.1:{free_port(4200)}/api",
            ray_address=f"http://127.0.0.1:{free_port(8265)}",
            ray_folder=tempfile.mkdtemp(prefix="switchyard-ray-", dir="/tmp"),
            ray_environment=token_environment(),
        )
        try:
            local._start_missing()
        except BaseException:
            # Also on Ctrl-C: nothing stays up that ``down`` would not know of.
            if not known:
                local.stop()
            raise
        # The file holds the Ray head's token.
        with open(local.path(), "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(local.model_dump_json(indent=1))
        return local

    def _start_missing(self) -> None:
        base, folder = home(), Path(self.ray_folder)
        client = {**environment(Path(self.home), self.prefect_url), **self.ray_environment}
        if not self._at_work("prefect", "server", "start"):
            server = server_environment(Path(self.home), self.prefect_url)
            detached(server_command(port_of(self.prefect_url)), base / "server.log", server, self.token)
        if not responds(f"{self.ray_address}/api/version"):
            head = head_command(port_of(self.ray_address), folder, free_port())
            detached(head, base / "ray.log", {**QUIET, **self.ray_environment}, self.token)
        self._wait("Prefect's server", base / "server.log", lambda: answers(self.prefect_url))
        # Prefect reads its settings when it is imported: this is the first import of it.
        os.environ.update(client)
        from flows.deploy import deploy_local

        # The worker's pool comes first: it would make one of its own.
        try:
            deploy_local()
        except httpx.HTTPError as error:
            said = str(error).partition("\n")[0]
            raise ServerFailed(f"Prefect's server took no deployments ({said}): run switchyard up again") from error
        if not self._at_work("prefect", "worker", "start"):
            worker = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"]
            detached(worker, base / "worker.log", client, self.token)
        self._wait("the Ray head", base / "ray.log", lambda: responds(f"{self.ray_address}/api/version"))

    def _at_work(self, *words: str) -> bool:
        """Whether one of these processes has the words on its command line."""
        for process in marked(self.token):
            with suppress(psutil.Error):
                if set(words) <= set(process.cmdline()):
                    return True
        return False

    @staticmethod
    def path() -> Path:
        return home() / "up.json"

    @staticmethod
    def _wait(what: str, log: Path, ready: object) -> None:
        deadline = time.monotonic() + START_SECONDS
        assert callable(ready)
        while not ready():
            if time.monotonic() > deadline:
                raise ServerFailed(f"{what} did not answer within {START_SECONDS:.0f} s: see {log}")
            time.sleep(0.3)

    def stop(self) -> None:
        end(self.token)
        shutil.rmtree(self.ray_folder, ignore_errors=True)
        self.path().unlink(missing_ok=True)


def port_of(url: str) -> int:
    port = urlparse(url).port
    assert port
    return port


def responds(url: str) -> bool:
    """Whether something answers there, be it only that a token is missing."""
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except (urllib.error.URLError, OSError):
        return False
    return True


def running_local() -> Local | None:
    """What is up on this machine, if its processes still live."""
    try:
        local = Local.model_validate_json(Local.path().read_text())
    except (FileNotFoundError, ValidationError):
        # Cut off when a disk was full, its processes cannot be known.
        return None
    return local if next(marked(local.token), None) else None


def on_running_cluster(settings: RunConfig) -> RunConfig:
    """The settings with the Ray head of ``switchyard up``, if it runs and they name no other."""
    up = running_local()
    if not up or settings.resources.ray_address:
        return settings
    resources = settings.resources.model_copy(update={"ray_address": up.ray_address})
    return settings.model_copy(update={"resources": resources})

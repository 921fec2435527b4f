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
from pathlib import Path

from pydantic import BaseModel

from flows.server import answers, environment, server_command, server_environment
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
        """Start what is not up yet; returns when everything answers."""
        known = running_local()
        if known:
            return known
        base = home()
        prefect_port, dashboard_port = free_port(4200), free_port(8265)
        local = cls(
            token=uuid.uuid4().hex,
            home=str(base / "prefect"),
            prefect_url=f"http://127.0.0.1:{prefect_port}/api",
            ray_address=f"http://127.0.0.1:{dashboard_port}",
            ray_folder=tempfile.mkdtemp(prefix="switchyard-ray-", dir="/tmp"),
            ray_environment=token_environment(),
        )
        client = {**environment(Path(local.home), local.prefect_url), **local.ray_environment}
        server = server_environment(Path(local.home), local.prefect_url)
        detached(server_command(prefect_port), base / "server.log", server, local.token)
        head = head_command(dashboard_port, Path(local.ray_folder), free_port())
        detached(head, base / "ray.log", {**QUIET, **local.ray_environment}, local.token)
        try:
            local._wait("Prefect's server", base / "server.log", lambda: answers(local.prefect_url))
            # Prefect reads its settings when it is imported: this is the first import of it.
            os.environ.update(client)
            from flows.deploy import deploy_local

            # The worker's pool comes first: it would make one of its own.
            deploy_local()
            worker = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"]
            detached(worker, base / "worker.log", client, local.token)
            local._wait("the Ray head", base / "ray.log", lambda: responds(f"{local.ray_address}/api/version"))
        except BaseException:
            # Also on Ctrl-C: nothing stays up that ``down`` would not know of.
            local.stop()
            raise
        # The file holds the Ray head's token.
        with open(local.path(), "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(local.model_dump_json(indent=1))
        return local

    @staticmethod
    def path() -> Path:
        return home() / "up.json"

    @staticmethod
    def _wait(what: str, log: Path, ready: object) -> None:
        deadline = time.monotonic() + START_SECONDS
        assert callable(ready)
        while not ready():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what} did not answer within {START_SECONDS:.0f} s; see {log}")
            time.sleep(0.3)

    def stop(self) -> None:
        end(self.token)
        shutil.rmtree(self.ray_folder, ignore_errors=True)
        self.path().unlink(missing_ok=True)


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
    except FileNotFoundError:
        return None
    return local if next(marked(local.token), None) else None


def on_running_cluster(settings: RunConfig) -> RunConfig:
    """The settings with the Ray head of ``switchyard up``, if it runs and they name no other."""
    up = running_local()
    if not up or settings.resources.ray_address:
        return settings
    resources = settings.resources.model_copy(update={"ray_address": up.ray_address})
    return settings.model_copy(update={"resources": resources})

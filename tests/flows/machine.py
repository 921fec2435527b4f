"""A machine with everything up, as ``switchyard up`` leaves it: its addresses, and how to ask them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from infra.process import marked

ROOT = Path(__file__).parent.parent.parent
START_SECONDS = 400


class Up:
    """What is up: Prefect's API, Ray's job server, and how to ask them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {**os.environ, "SWITCHYARD_HOME": str(home)}
        self.switchyard("up")
        self.facts: dict[str, Any] = json.loads((home / "up.json").read_text())
        self.ui = self.facts["prefect_url"].removesuffix("/api")
        self.api = httpx.Client(base_url=self.facts["prefect_url"], timeout=60)
        token = {"Authorization": f"Bearer {self.facts['ray_environment']['RAY_AUTH_TOKEN']}"}
        self.ray = httpx.Client(base_url=self.facts["ray_address"], timeout=60, headers=token)

    def switchyard(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "flows.cli", *arguments]
        subprocess.run(command, env=self.environment, cwd=ROOT, check=True, timeout=START_SECONDS)

    def ask(self, path: str, **body: Any) -> Any:
        """POST with a body, else GET; what the API answers."""
        return self.send("POST" if body else "GET", path, body)

    def send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """What the API answers. A server whose database is busy is asked again."""
        while (reply := self.api.request(method, path, json=body or None)).status_code == 503:
            time.sleep(1)
        reply.raise_for_status()
        return reply.json() if reply.content else None

    def deployment(self, flow: str, name: str | None = None) -> dict[str, Any]:
        return self.ask(f"/deployments/name/{flow}/{name or flow}")

    def start(self, flow: str, **parameters: Any) -> str:
        """Start a run of a deployment; returns the flow run's id."""
        deployment = self.deployment(flow)["id"]
        return self.ask(f"/deployments/{deployment}/create_flow_run", parameters=parameters)["id"]

    def state(self, run: str) -> dict[str, Any]:
        return self.ask(f"/flow_runs/{run}")["state"]

    def wait(self, run: str, *types: str, seconds: float = 600) -> dict[str, Any]:
        """The run's state, once it is one of these, or final."""
        deadline = time.monotonic() + seconds
        while (state := self.state(run))["type"] not in {*types, "COMPLETED", "FAILED", "CRASHED", "CANCELLED"}:
            assert time.monotonic() < deadline, state
            time.sleep(0.5)
        return state

    def crash(self, *words: str) -> None:
        """``kill -9`` what has these words on its command line, and ``switchyard up`` again, which starts it anew."""
        found = [process for process in marked(self.facts["token"]) if set(words) <= set(process.cmdline())]
        assert found
        for process in found:
            process.kill()
            process.wait()
        self.switchyard("up")
        assert json.loads((self.home / "up.json").read_text()) == self.facts

    def artifacts(self, run: str) -> dict[str, dict[str, Any]]:
        """Artifacts of a flow run, by key."""
        found = self.ask("/artifacts/filter", artifacts={"flow_run_id": {"any_": [run]}})
        return {artifact["key"]: artifact for artifact in found}

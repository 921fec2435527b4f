"""The recurring distillation of docs/operate.md, step by step: an inbox, a schedule that is switched on in a browser, a
promotion that a webhook hears of, and the next run, which finds nothing new."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny
from browser import Operator
from machine import ROOT, Up
from test_recurring import put

from infra.store import LocalStore
from tasks.config.form import marked
from tasks.promoted import current

SECONDS = 1500
pytestmark = [pytest.mark.browser, pytest.mark.long, pytest.mark.timeout(SECONDS + 600)]


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(address of a receiver, what it was sent)."""
    received: list[dict[str, Any]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    receiver = HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{receiver.server_port}/hook", received
    receiver.shutdown()


def scheduled(up: Up, deployment: str, count: int) -> list[dict[str, Any]]:
    """The first completed runs that a schedule made, once there are so many."""
    mine = {"deployments": {"id": {"any_": [deployment]}}, "sort": "START_TIME_ASC"}
    deadline = time.monotonic() + SECONDS
    while True:
        runs = [run for run in up.ask("/flow_runs/filter", **mine) if run["auto_scheduled"] and run["start_time"]]
        bad = [run["state"] for run in runs if run["state_type"] in ("FAILED", "CRASHED")]
        assert not bad
        done = [run for run in runs if run["state_type"] == "COMPLETED"]
        if len(done) >= count:
            return done
        assert time.monotonic() < deadline, [run["state"] for run in runs]
        time.sleep(2)


def test_a_scheduled_run_promotes_and_the_next_finds_nothing_new(
    operator: Operator,
    up: Up,
    tmp_path: Path,
    webhook: tuple[str, list[dict[str, Any]]],
) -> None:
    page, (address, received), root = operator.page, webhook, tmp_path / "root"
    (tmp_path / "inbox").mkdir()
    put(tmp_path / "inbox", "monday.jsonl", 0)
    notify = [sys.executable, "-m", "flows.notify", address, "--name", "tiny"]
    subprocess.run(notify, env=up.environment, cwd=ROOT, check=True, timeout=300)

    # A week has a minute here.
    tiny.save_model(tmp_path / "teacher", seed=1)
    data = tiny.recurring(tmp_path, tmp_path / "inbox")
    data["warmup"] |= {"steps": 30, "learning_rate": 3.0e-3}
    deployment = up.deployment("distill-recurring")
    id_, (weekly,) = deployment["id"], deployment["schedules"]
    up.send("PATCH", f"/deployments/{id_}", {"parameters": {"config": marked(data)}})
    minute = {"schedule": {"cron": "* * * * *", "timezone": "Europe/Berlin"}, "parameters": {"root": str(root)}}
    up.send("PATCH", f"/deployments/{id_}/schedules/{weekly['id']}", minute)
    page.goto(f"{up.ui}/deployments/deployment/{id_}")
    page.locator(".p-toggle").locator("visible=true").first.click()
    operator.shoot("switched-on")
    page.goto("about:blank")
    try:
        first, second = scheduled(up, id_, 2)[:2]
    finally:
        up.send("PATCH", f"/deployments/{id_}/schedules/{weekly['id']}", {"active": False})

    promoted = current(LocalStore(root), "tiny")
    assert promoted is not None
    assert second["state"]["message"].startswith("nothing new")
    assert [first["name"], second["name"]] == ["tiny 1, 1 new file", "tiny: nothing new"]
    deadline = time.monotonic() + 60
    while not received:
        assert time.monotonic() < deadline, "the webhook heard nothing"
        time.sleep(0.5)
    assert [message["promotion"]["student"] for message in received] == [str(root / promoted.student)]
    page.goto(f"{up.ui}/runs/flow-run/{first['id']}")
    page.get_by_text("Artifacts", exact=True).first.click()
    page.get_by_role("link", name="summary").first.wait_for()
    operator.shoot("promoted")

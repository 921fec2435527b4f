"""Deployments on a real server: as `switchyard up` leaves them, as `prefect deploy` puts them, and what they do."""

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
import yaml
from machine import ROOT, Up

from flows.gpus import gpus_here
from flows.server import environment
from infra.lease import lease_path
from infra.store import LocalStore
from tasks.config.preset import Preset

SECONDS = 900
SLOTS = "switchyard-gpus"
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
LOCAL = ("distill", "distill-recurring", "evaluate", "reap")
# What a deployment says, beside ids and times.
SAID = (
    *("entrypoint", "parameters", "tags", "version", "description", "work_pool_name", "job_variables"),
    *("parameter_openapi_schema", "enforce_parameter_schema", "global_concurrency_limit", "concurrency_options"),
)


def said(deployment: dict[str, Any]) -> dict[str, Any]:
    limit = deployment["global_concurrency_limit"]
    schedules = [
        (found["slug"], found["active"], found["schedule"], found["parameters"]) for found in deployment["schedules"]
    ]
    return {key: deployment[key] for key in SAID} | {
        "global_concurrency_limit": limit and limit["limit"],
        "schedules": [
            (slug, active, schedule["cron"], schedule["timezone"], parameters)
            for slug, active, schedule, parameters in schedules
        ],
    }


@pytest.mark.timeout(SECONDS)
def test_up_leaves_deployments_that_prefect_deploys_alike(up: Up, tmp_path: Path) -> None:
    before = {name: said(up.deployment(name)) for name in LOCAL}
    assert before["distill"]["global_concurrency_limit"] == 1
    assert before["distill"]["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    assert before["reap"]["schedules"] == [("hourly", True, "17 * * * *", "Etc/UTC", {})]
    weekly = ("weekly", False, "0 3 * * 1", "Etc/UTC", {"root": "runs/weekly"})
    assert before["distill-recurring"]["schedules"] == [weekly]
    assert before["distill-recurring"]["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    slots = up.ask(f"/v2/concurrency_limits/{SLOTS}")
    assert (slots["limit"], slots["active"]) == (gpus_here() or 8, True)
    assert {deployment["version"] for deployment in before.values()} == {version("switchyard")}

    ray, root, image = "http://ray:8265", "s3://bucket/prefix", "registry.example/switchyard:1"
    elsewhere = {"SWITCHYARD_RAY_ADDRESS": ray, "SWITCHYARD_ROOT": root, "SWITCHYARD_IMAGE": image}
    settings = {**environment(tmp_path, up.facts["prefect_url"]), **elsewhere, "PWD": str(ROOT)}

    def prefect(*arguments: str) -> None:
        command = [sys.executable, "-m", "prefect", *arguments]
        known = {**up.environment, **settings}
        done = subprocess.run(command, env=known, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    # As docs/operate.md has it.
    template = ROOT / "infra/kubernetes/prefect/pool.json"
    prefect("gcl", "update", SLOTS, "--limit", "3")
    prefect("work-pool", "create", "switchyard-docker", "--type", "docker")
    prefect(
        "work-pool", "create", "switchyard-kubernetes", "--type", "kubernetes", "--base-job-template", str(template)
    )
    prefect("--no-prompt", "deploy", "--all")
    assert up.ask("/work_pools/switchyard-kubernetes")["base_job_template"] == json.loads(template.read_text())
    assert up.api.post("/deployments/count", json={}).json() == len(DEPLOYMENTS)
    assert {name: said(up.deployment(name)) for name in LOCAL} == before
    for kind in ("docker", "kubernetes"):
        for flow in ("distill", "evaluate"):
            there = up.deployment(flow, f"{flow}-{kind}")
            assert there["work_pool_name"] == f"switchyard-{kind}"
            assert there["parameters"]["root"] == root
            assert there["job_variables"]["image"] == image
        recurring = up.deployment("distill-recurring", f"distill-recurring-{kind}")
        assert recurring["parameters"]["root"] == root
        assert [schedule["parameters"] for schedule in recurring["schedules"]] == [{}]
        chosen = Preset.model_validate(recurring["parameters"]["config"]).settings()
        assert chosen.resources.ray_address == ray
        assert chosen.prompts.sources[0].path == f"{root}/inbox"
        assert up.deployment("reap", f"reap-{kind}")["parameters"] == {"ray_address": ray}
    # Somebody has set it: what deploys again leaves it.
    assert up.ask(f"/v2/concurrency_limits/{SLOTS}")["limit"] == 3
    assert subprocess.run(["git", "diff", "--quiet", "prefect.yaml"], cwd=ROOT).returncode == 0


@pytest.mark.timeout(SECONDS)
def test_a_schedule_makes_runs(up: Up) -> None:
    mine = {"deployments": {"id": {"any_": [up.deployment("reap")["id"]]}}}
    deadline = time.monotonic() + 90
    while not any(run["auto_scheduled"] for run in up.ask("/flow_runs/filter", **mine)):
        assert time.monotonic() < deadline, (up.home / "server.log").read_text()[-3000:]
        time.sleep(1)


@pytest.mark.long
@pytest.mark.timeout(SECONDS)
def test_missed_schedules_are_not_all_caught_up(up: Up) -> None:
    """What a worker finds that was away for hours: one of the missed runs is made, the others end at once."""
    deployment, now = up.deployment("reap")["id"], datetime.now(UTC)
    runs = []
    for hours in (3, 2, 1):
        late = {"scheduled_time": (now - timedelta(hours=hours)).isoformat()}
        state = {"type": "SCHEDULED", "name": "Scheduled", "state_details": late}
        runs.append(up.ask(f"/deployments/{deployment}/create_flow_run", state=state)["id"])
    ends = [up.wait(run, seconds=SECONDS) for run in runs]
    assert sorted(state["type"] for state in ends) == ["CANCELLED", "CANCELLED", "COMPLETED"], ends


# Processes of their own: Prefect reads its settings when it is imported.
SAYS = """
import sys
from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from flows.trackers import Following
from flows.watch import MOST_LINES, StageWatch
from infra.store import open_store
from tasks.config import load_config

TRACE = ["Traceback (most recent call last):", '  File "stage.py", line 1, in run', "RuntimeError: burst"]

@flow(name="says", log_prints=False)
def says():
    following = Following(load_config("configs/quickstart.yaml"), "run", open_store(sys.argv[1]), get_run_logger())
    watch = StageWatch("annotate", following)
    watch.take(["WARNING annotate: hot", *TRACE, "a library prints this", "CRITICAL annotate: burning"])
    watch.take(f"INFO annotate: line {number}" for number in range(MOST_LINES + 500))
    return str(flow_run.id)

print(says(), MOST_LINES)
"""
WRITES = """
import sys
import time
from pathlib import Path
from prefect.artifacts import create_markdown_artifact
from flows.artifacts import put
written = 0
while not Path(sys.argv[1]).exists():
    put(create_markdown_artifact, markdown="text", key=f"away-{written}")
    written += 1
    time.sleep(0.2)  # a server that has no time for others answers them with 503
print(written)
"""


@pytest.mark.timeout(SECONDS)
def test_lines_keep_their_level_and_are_no_flood(up: Up, tmp_path: Path) -> None:
    settings = {**up.environment, **environment(tmp_path, up.facts["prefect_url"])}
    command = [sys.executable, "-c", SAYS, str(tmp_path)]
    done = subprocess.run(command, env=settings, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    run, most = done.stdout.split()
    lines: list[dict[str, Any]] = []
    asked = {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
    while found := up.ask("/logs/filter", **asked, offset=len(lines)):
        lines += found
    by_level: dict[int, list[str]] = {}
    for line in lines:
        by_level.setdefault(line["level"], []).append(line["message"])
    assert by_level[logging.WARNING] == ["annotate: hot"]
    assert by_level[logging.CRITICAL] == ["annotate: burning"]
    assert [len(by_level[logging.ERROR]), by_level[logging.ERROR][-1]] == [3, "RuntimeError: burst"]
    assert logging.DEBUG not in by_level
    told = [message for message in by_level[logging.INFO] if message.startswith("annotate: ")]
    assert len(told) == int(most) + 1
    assert told[-1] == "annotate: further lines of this level are in the log of its Ray job alone"


@pytest.mark.timeout(SECONDS)
def test_artifacts_wait_for_a_server_that_is_started_again(up: Up, tmp_path: Path) -> None:
    settings = {**up.environment, **environment(tmp_path, up.facts["prefect_url"])}
    command = [sys.executable, "-c", WRITES, str(tmp_path / "enough")]
    with subprocess.Popen(command, env=settings, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        while not up.ask("/artifacts/count", artifacts={"key": {"like_": "away-"}}):
            assert writer.poll() is None
            time.sleep(0.5)
        try:
            up.crash("prefect", "server", "start")
        finally:
            (tmp_path / "enough").touch()
        output, _ = writer.communicate(timeout=SECONDS)
    assert writer.returncode == 0
    # By key: one whose answer was lost with the server is there twice.
    assert up.ask("/artifacts/latest/count", artifacts={"key": {"like_": "away-"}}) == int(output)


def test_the_server_refuses_what_the_form_refuses(up: Up, tmp_path: Path) -> None:
    data = tiny.settings(tmp_path)
    data["train"]["steps"] = 0
    with pytest.raises(httpx.HTTPStatusError, match="409"):
        up.start("distill", config=data, root=str(tmp_path / "root"))


@pytest.mark.timeout(SECONDS)
def test_a_run_that_cannot_work_fails_with_its_lines(up: Up, tmp_path: Path) -> None:
    data = tiny.settings(tmp_path)
    data["train"]["micro_batch"] = 3
    run = up.start("distill", config=data, root=str(tmp_path / "root"))
    absent = {"type": "huggingface", "id": "/nowhere"}
    source = {"type": "jsonl", "path": "/no.jsonl"}
    other = up.start("evaluate", config={"name": "none", "model": absent, "problems": [source]}, root=str(tmp_path))
    state = up.wait(run, seconds=SECONDS)
    assert (state["type"], state["name"]) == ("FAILED", "Failed")
    assert state["message"] == "train: micro_batch 3 does not divide batch_size 4"
    assert "micro_batch 3" in up.artifacts(run)["problems"]["data"]
    state = up.wait(other, seconds=SECONDS)
    assert state["type"] == "FAILED"
    assert state["message"].startswith("model: id: no folder '/nowhere'")
    assert "problems.0: " in state["message"]


def running(up: Up, name: str, beats: datetime | None) -> str:
    """A flow run that some process began, and that last told it lives at this time."""
    flow = up.deployment("distill")["flow_id"]
    run = up.ask("/flow_runs/", flow_id=flow, name=name, state={"type": "RUNNING", "name": "Running"})["id"]
    if beats:
        resource = {"prefect.resource.id": f"prefect.flow-run.{run}"}
        event = {"occurred": beats.isoformat(), "event": "prefect.flow-run.heartbeat", "resource": resource}
        up.api.post("/events", json=[{**event, "id": run}]).raise_for_status()
        # The server writes events down some seconds later.
        beat = {"resource": {"id": [resource["prefect.resource.id"]]}}
        while not up.ask("/events/filter", filter=beat)["events"]:
            time.sleep(0.5)
    return run


@contextmanager
def renewed(store: LocalStore, run: str) -> Iterator[None]:
    """A run whose flow lives."""
    over = threading.Event()

    def renew() -> None:
        while not over.wait(1):
            store.write(lease_path(run), str(time.monotonic_ns()).encode())

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.timeout(SECONDS)
def test_reaping_ends_what_nobody_looks_after(up: Up, tmp_path: Path) -> None:
    store, now = LocalStore(tmp_path / "root"), datetime.now(UTC)
    zombie = running(up, "zombie", now - timedelta(minutes=10))
    alive = running(up, "alive", now)
    foreign = running(up, "foreign", None)
    store.write(lease_path("gone"), b"1")
    ids = {name: f"{name}-{zombie}" for name in ("gone", "kept")}
    for name, job in ids.items():
        asked = {"entrypoint": "sleep 600", "submission_id": job, "metadata": {"run": name, "root": store.uri}}
        up.ray.post("/api/jobs/", json=asked).raise_for_status()
    with renewed(store, "kept"):
        run = up.start("reap", watch_seconds=15)
        assert up.wait(run, seconds=SECONDS)["type"] == "COMPLETED"
    states = {name: up.state(found) for name, found in (("zombie", zombie), ("alive", alive), ("foreign", foreign))}
    assert {name: state["type"] for name, state in states.items()} == {
        "zombie": "CRASHED",
        "alive": "RUNNING",
        "foreign": "RUNNING",
    }
    assert states["zombie"]["message"].startswith("no sign of life since")
    jobs = {name: up.ray.get(f"/api/jobs/{job}").json()["status"] for name, job in ids.items()}
    assert jobs == {"gone": "STOPPED", "kept": "RUNNING"}
    assert ids["gone"] in up.artifacts(run)["reaped"]["data"]
    up.ray.post(f"/api/jobs/{ids['kept']}/stop").raise_for_status()


@pytest.mark.long
@pytest.mark.timeout(SECONDS)
def test_any_model_is_measured_on_any_problems(up: Up, tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", seed=1)
    problems = [{"prompt": f"{a} + 1?", "answer": str(a + 1), "reference": f"It is {a + 1}."} for a in range(8)]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, problems)))
    fields = {"prompt": "prompt", "answer": "answer", "reference": "reference"}
    config = {
        "name": "weekly",
        "model": {"type": "huggingface", "id": str(tmp_path / "model")},
        "problems": [{"type": "jsonl", "path": str(tmp_path / "problems.jsonl"), "fields": fields}],
        "count": 8,
        "max_prompt_tokens": 96,
        "evaluate": {"seeds": [1], "max_tokens": 12, "bootstrap": 200},
        "engine": {"max_model_len": 256, "kv_cache_gib": 0.05},
    }
    run = up.start("evaluate", config=config, root=str(tmp_path / "root"))
    state = up.wait(run, seconds=SECONDS)
    assert state["type"] == "COMPLETED", state
    (row,) = json.loads(up.artifacts(run)["metrics"]["data"])
    assert row["model"] == "weekly"
    assert row["loss"] > 0
    assert 0 <= row["accuracy"] <= 1

    # More than there are: said in the words of these settings.
    run = up.start("evaluate", config={**config, "count": 9}, root=str(tmp_path / "root"))
    state = up.wait(run, seconds=SECONDS)
    assert state["type"] == "FAILED"
    assert "count: 9 asked for, but problems hold 8" in state["message"]

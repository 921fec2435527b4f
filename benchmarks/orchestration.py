"""What Prefect and Ray add to a stage, and what a thousand runs of history do to the server's answer times.

    python -m benchmarks.orchestration --json

A stage that does next to nothing (``benchmarks/short_stage.py``) goes through a run's own spine: a Prefect task, a Ray
job, its log, progress and manifest. In turn with it the same command is started from a shell, and an empty Ray job
(``true``) on the same head, polled until it has ended. What the spine adds is the first less the second, medians of the
rounds; ``seconds_above_empty_job`` is what remains of it without the third.

Then the finished flow run is copied a thousand times in the server's database, as runs that a deployment's schedule
made: runs, tasks, states, log lines, artifacts, events. Calls that the spine, a worker and Prefect's pages make are
timed before and after.
"""

import os
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx

from benchmarks.conditions import conditions, options, publish
from flows.local import POOL
from flows.server import EmbeddedServer
from infra.cluster import FINAL, QUIET
from tasks.config import load_config
from tasks.stage import StageSpec

STAGE = "benchmarks.short_stage"
CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
EMPTY_POLL_SECONDS = 0.02
# What belongs to one run, by table: the column that names the run, one of its tasks, either as a resource, or an event.
TABLES = {
    "flow_run": "id",
    "flow_run_state": "flow_run_id",
    "task_run": "flow_run_id",
    "task_run_state": "task_run_id",
    "artifact": "flow_run_id",
    "log": "flow_run_id",
    "events": "resource_id",
    "event_resources": "event_id",
}
DEPLOYMENT = "distill-recurring"
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
CALLS = 40


def bare(root: Path, number: int) -> float:
    """Seconds of the stage's command from a shell."""
    spec = StageSpec(stage="bare", module=STAGE, settings={"number": number}, root=str(root))
    path = root / f"bare-{number}.json"
    path.write_text(spec.model_dump_json())
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", STAGE, "--spec", str(path)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def empty_job(client: Any, number: int) -> float:
    """Seconds from the submission of a job that does nothing to its end."""
    began = time.perf_counter()
    environment = {"env_vars": QUIET}
    job = client.submit_job(
        entrypoint="true", submission_id=f"empty-{number}", entrypoint_num_cpus=0, runtime_env=environment
    )
    while str(client.get_job_status(job).value) not in FINAL:
        time.sleep(EMPTY_POLL_SECONDS)
    return time.perf_counter() - began


def rounds_of(root: Path, count: int) -> tuple[dict[str, list[float]], str]:
    """Seconds of every side's rounds, and the id of the flow run they belong to."""
    from prefect import flow
    from prefect.runtime import flow_run

    from flows.runner import Runner

    @flow(name="orchestration", validate_parameters=False)
    def orchestration() -> tuple[dict[str, list[float]], str]:
        times: dict[str, list[float]] = {"stage": [], "bare": [], "empty_job": []}
        with Runner.open(load_config(CONFIG), str(root)) as runner:
            # The first stage starts the Ray head and the engine room.
            runner.stage("short", STAGE, {"number": count})
            time.sleep(10)
            for number in range(count):
                began = time.perf_counter()
                runner.stage("short", STAGE, {"number": number})
                times["stage"].append(time.perf_counter() - began)
                times["bare"].append(bare(root, number))
                times["empty_job"].append(empty_job(runner.cluster.client, number))
                print(", ".join(f"{side} {found[-1]:.2f} s" for side, found in times.items()), file=sys.stderr)
            return times, str(flow_run.id)

    return orchestration()


def rows_of(db: sqlite3.Connection, run: str) -> dict[str, list[dict[str, Any]]]:
    """By table, the rows that belong to a flow run."""
    found: dict[str, list[dict[str, Any]]] = {}
    for table, column in TABLES.items():
        tasks = [task["id"] for task in found.get("task_run", [])]
        owners = {
            "task_run_id": tasks,
            "resource_id": [f"prefect.flow-run.{run}", *(f"prefect.task-run.{task}" for task in tasks)],
            "event_id": [event["id"] for event in found.get("events", [])],
        }.get(column, [run])
        marks = ", ".join("?" * len(owners))
        found[table] = [dict(row) for row in db.execute(f"SELECT * FROM {table} WHERE {column} IN ({marks})", owners)]
    return found


def copies(
    rows: dict[str, list[dict[str, Any]]], times: set[tuple[str, str]], count: int, scheduled: dict[str, Any]
) -> Iterator[Any]:
    """The rows of every copy, with ids of their own and an hour before the one they follow. ``scheduled``: what of its
    flow run says that a schedule made it."""
    for number in range(1, count + 1):
        ids = {row["id"]: str(uuid.uuid4()) for table in rows.values() for row in table}

        def own(found: re.Match[str], ids: dict[str, str] = ids) -> str:
            return ids.get(found[0], found[0])

        for table, entries in rows.items():
            for row in entries:
                copy = {name: UUID.sub(own, value) if isinstance(value, str) else value for name, value in row.items()}
                copy |= scheduled if table == "flow_run" else {}
                for name in row:
                    if (table, name) in times and row[name]:
                        copy[name] = str(datetime.fromisoformat(row[name]) - timedelta(hours=number))
                yield table, copy


def multiply(database: Path, run: str, count: int, scheduled: dict[str, Any]) -> dict[str, int]:
    """Copy a finished flow run so many times; how many rows there are then, by table."""
    with closing(sqlite3.connect(database, timeout=120)) as db:
        db.row_factory = sqlite3.Row
        rows = rows_of(db, run)
        assert all(rows.values()), "the server writes events down some seconds later"
        times = {
            (table, column["name"])
            for table in TABLES
            for column in db.execute(f"PRAGMA table_info({table})")
            if column["type"] == "DATETIME" and column["name"] != "total_run_time"
        }
        with db:
            for table, row in copies(rows, times, count, scheduled):
                columns = ", ".join(f'"{name}"' for name in row)
                marks = ", ".join("?" * len(row))
                db.execute(f"INSERT INTO {table} ({columns}) VALUES ({marks})", list(row.values()))
        return {table: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in TABLES}


def deployed(url: str) -> dict[str, Any]:
    """Put the deployments onto the server; what a flow run that a schedule of one made says of it."""
    from flows.deploy import deploy_local

    deploy_local()
    found = httpx.get(f"{url}/deployments/name/{DEPLOYMENT}/{DEPLOYMENT}", timeout=60).raise_for_status().json()
    said = {name: found[name] for name in ("flow_id", "work_queue_id", "work_queue_name")}
    return {**said, "deployment_id": found["id"], "auto_scheduled": 1}


def answer_times(url: str, run: str, deployment: str) -> dict[str, float]:
    """Median milliseconds of calls: three of the spine's, two for what a schedule made, six of Prefect's pages."""
    newest = {"sort": "START_TIME_DESC", "limit": 50}
    with httpx.Client(base_url=url, timeout=60) as api:
        line = {"name": "prefect", "level": 20, "message": "a line", "flow_run_id": run}
        facts = api.get(f"/flow_runs/{run}").raise_for_status().json()
        task = {"flow_run_id": run, "task_key": "short", "name": "short"}
        stamp = datetime.fromisoformat(facts["start_time"]).isoformat()
        calls: dict[str, tuple[str, str, Any]] = {
            "look at a run": ("GET", f"/flow_runs/{run}", None),
            "begin a task": ("POST", "/task_runs/", task),
            "write a line": ("POST", "/logs/", line),
            "a worker's look": ("POST", f"/work_pools/{POOL}/get_scheduled_flow_runs", {}),
            "a deployment's next runs": (
                "POST",
                "/deployments/get_scheduled_flow_runs",
                {"deployment_ids": [deployment], "limit": 100},
            ),
            "list of deployments": ("POST", "/deployments/paginate", {"limit": 50}),
            "a deployment's runs": (
                "POST",
                "/flow_runs/filter",
                {"deployments": {"id": {"any_": [deployment]}}, **newest},
            ),
            "list of runs": ("POST", "/flow_runs/filter", newest),
            "count of runs": ("POST", "/flow_runs/count", {}),
            "a run's log": ("POST", "/logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200}),
            "artifacts": ("POST", "/artifacts/latest/filter", {"limit": 50}),
        }
        found = {}
        for name, (method, path, body) in calls.items():
            seconds = []
            for number in range(CALLS):
                if name == "begin a task":
                    body = {**task, "dynamic_key": f"{stamp}-{uuid.uuid4()}-{number}"}
                elif name == "write a line":
                    body = [{**line, "timestamp": stamp}]
                began = time.perf_counter()
                api.request(method, path, json=body).raise_for_status()
                seconds.append(time.perf_counter() - began)
            found[name] = round(1000 * statistics.median(seconds), 1)
        return found


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--history", type=int, default=1000, help="how many copies of the flow run make the history")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="switchyard-orchestration-") as folder:
        server = EmbeddedServer(Path(folder) / "prefect")
        # Prefect reads its settings when it is imported.
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "WARNING")
        server.start()
        try:
            server.wait()
            times, run = rounds_of(Path(folder) / "root", arguments.rounds)
            scheduled = deployed(server.url)
            before = answer_times(server.url, run, scheduled["deployment_id"])
            rows = multiply(Path(folder) / "prefect" / "prefect.db", run, arguments.history, scheduled)
            after = answer_times(server.url, run, scheduled["deployment_id"])
        finally:
            server.stop()
    middle = {side: statistics.median(found) for side, found in times.items()}
    added = middle["stage"] - middle["bare"]
    result = {
        "conditions": conditions(),
        "rounds": arguments.rounds,
        "seconds_per_stage": round(added, 2),
        "seconds_above_empty_job": round(added - middle["empty_job"], 2),
        "medians": {side: round(seconds, 2) for side, seconds in middle.items()},
        "seconds": {side: [round(seconds, 3) for seconds in found] for side, found in times.items()},
        "history": {"runs": arguments.history, "rows": rows},
        "answer_ms": {"before": before, "after": after},
    }
    print(
        f"a stage takes {middle['stage']:.2f} s, its command {middle['bare']:.2f} s, an empty job "
        f"{middle['empty_job']:.2f} s: the spine adds {added:.2f} s, {added - middle['empty_job']:.2f} s above it"
    )
    for name in before:
        print(f"{name}: {before[name]} ms, with {arguments.history} runs of history {after[name]} ms")
    publish("orchestration", result, arguments)


if __name__ == "__main__":
    main()

"""A person operates a run in Prefect's UI, in a real browser: what docs/operate.md says, step by step.

Screenshots go to the test's folder, or to the one that SCREENSHOTS names.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import tiny
from browser import Operator
from machine import ROOT, Up

from infra.process import marked as processes_with
from tasks.config.form import marked

SECONDS = 2400
# From the confirmed cancel to the last process of the run.
CANCEL_SECONDS = 15
# Share of the memory that Ray's idle workers may still hold then.
LEFT = 0.2
pytestmark = [pytest.mark.browser, pytest.mark.timeout(SECONDS)]


def at_work(up: Up, before: set[int]) -> list[str]:
    """Processes that a run has started: flow, jobs, actors, engines, training. Not among them: idle workers of Ray, and
    the actor that Ray Train leaves on a cluster, one for all runs."""
    found = []
    for process in processes_with(up.facts["token"]):
        try:
            title = " ".join(process.cmdline())
            own = not any(name in title for name in ("ray::IDLE", "ray::_AutoscalingCoordinatorActor"))
            if process.pid not in before and process.status() != psutil.STATUS_ZOMBIE and own:
                found.append(title[:200])
        except psutil.Error:
            continue
    return found


def memory(up: Up, before: set[int]) -> float:
    """GiB that the processes of a run hold, Ray's idle workers among them. What they share is counted once."""
    held = 0
    for process in processes_with(up.facts["token"]):
        with suppress(psutil.Error):
            held += 0 if process.pid in before else process.memory_full_info().pss
    return held / 2**30


def start_from_form(operator: Operator, up: Up, folder: Path) -> str:
    """Fill the form for a tiny run whose results lie at ``folder/root``; returns the flow run's id."""
    tiny.save_model(folder / "teacher", seed=1)
    # Deployments keep what their users start from.
    start = {"config": marked(tiny.settings(folder)), "root": str(folder / "root")}
    deployment = up.deployment("distill")["id"]
    up.send("PATCH", f"/deployments/{deployment}", {"parameters": start})
    operator.open_form()
    operator.field("Name").locator("textarea").fill("browser")
    # Another choice of a union stays chosen while its fields are filled.
    gate = operator.field("Gate (Optional)")
    gate.scroll_into_view_if_needed()
    operator.take_kind(gate, "Linear", "Floor (Optional)")
    gate.locator(".schema-form-property", has_text="Floor (Optional)").locator("input").first.fill("0.25")
    operator.shoot("form")
    run = operator.submit()
    config = up.ask(f"/flow_runs/{run}")["parameters"]["config"]
    assert config["name"] == "browser"
    assert config["train"]["method"]["gate"] == {"linear": True, "floor": 0.25}
    return run


def watch(operator: Operator, up: Up, run: str, before: set[int], *kinds: str) -> None:
    """Wait until processes of all these kinds are at work, and look at the run's page."""
    # The page draws its graph all the time, and would take their cores.
    operator.page.goto("about:blank")
    deadline = time.monotonic() + SECONDS
    while not all(any(kind in title for title in at_work(up, before)) for kind in kinds):
        assert up.state(run)["type"] in ("SCHEDULED", "PENDING", "RUNNING"), up.state(run)
        assert time.monotonic() < deadline
        time.sleep(1)
    operator.page.goto(f"{up.ui}/runs/flow-run/{run}")
    operator.shoot("running")


def cancel(operator: Operator, up: Up, run: str, before: set[int]) -> None:
    """Cancel the run on its page: nothing of it is left at work, and its memory is free."""
    held = memory(up, before)
    operator.page.get_by_role("button", name="Cancel", exact=True).click()
    operator.press("Confirm", "**/set_state")
    wait_for_nothing(up, before, held)
    assert up.wait(run, seconds=60)["type"] == "CANCELLED"
    operator.shoot("cancelled")


def wait_for_nothing(up: Up, before: set[int], held: float) -> None:
    """Within the time of a cancel nothing of the run is at work, and of the GiB that it held little is left."""
    began = time.monotonic()
    while (working := at_work(up, before)) or (left := memory(up, before)) > LEFT * held:
        assert time.monotonic() - began < CANCEL_SECONDS, working or (left, held)
        time.sleep(0.1)
    print(
        f"{time.monotonic() - began:.1f} s after the cancel nothing worked, and {left:.2f} of {held:.2f} GiB were held"
    )


def start_again(operator: Operator, up: Up, run: str) -> str:
    """Copy the run whose page is open to a new one; returns the new one's id."""
    operator.take_of_menu(operator.page.locator(".flow-run-menu"), "Copy to new run")
    again = operator.submit()
    assert again != run
    assert up.ask(f"/flow_runs/{again}")["parameters"] == up.ask(f"/flow_runs/{run}")["parameters"]
    return again


def suspend(operator: Operator, up: Up, run: str, before: set[int]) -> None:
    """Suspend the run whose page is open: its processes end. Resume it: a worker starts it again."""
    page = operator.page
    page.get_by_role("button", name="Suspend", exact=True).click()
    operator.press("Submit", "**/set_state")
    deadline = time.monotonic() + SECONDS
    while working := at_work(up, before):
        assert time.monotonic() < deadline, working
        time.sleep(0.5)
    state = up.state(run)
    assert (state["type"], state["name"]) == ("PAUSED", "Suspended")
    page.reload()
    page.get_by_role("button", name="Resume", exact=True).click()
    operator.press("Submit", "**/resume")
    assert up.wait(run, "RUNNING", seconds=SECONDS)["type"] == "RUNNING"


@pytest.fixture
def before(up: Up) -> set[int]:
    """Processes that were there before the run."""
    return {process.pid for process in processes_with(up.facts["token"])}


def test_a_run_is_started_from_the_form_cancelled_and_started_again(
    operator: Operator, up: Up, tmp_path: Path, before: set[int]
) -> None:
    run = start_from_form(operator, up, tmp_path)
    watch(operator, up, run, before, "prefect.engine", "infra.engine_room", "tasks.models")
    cancel(operator, up, run, before)
    again = start_again(operator, up, run)
    up.wait(again, "RUNNING", seconds=SECONDS)
    suspend(operator, up, again, before)
    up.ask(f"/flow_runs/{again}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})
    assert up.wait(again, seconds=SECONDS)["type"] == "CANCELLED"


def test_the_schedule_is_seen(operator: Operator, up: Up) -> None:
    page = operator.page
    page.goto(f"{up.ui}/deployments/deployment/{up.deployment('distill-recurring')['id']}")
    page.get_by_text("weekly", exact=True).locator("visible=true").first.wait_for()
    operator.shoot("schedule")


@contextmanager
def shell_run(up: Up, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """``switchyard run`` beside what is up; what it tells a person stands in ``folder/said.txt``."""
    command = [
        sys.executable,
        "-m",
        "flows.cli",
        "run",
        str(folder / "tiny.yaml"),
        "--root",
        str(folder / "root"),
        "--json",
    ]
    with (
        (folder / "said.txt").open("w") as stderr,
        subprocess.Popen(
            command, cwd=ROOT, env=up.environment, text=True, stdout=subprocess.PIPE, stderr=stderr
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.long
def test_a_run_from_a_shell_is_cancelled_and_continued(
    operator: Operator, up: Up, tmp_path: Path, before: set[int]
) -> None:
    tiny.write_config(tmp_path)
    running = {"type": {"any_": ["RUNNING"]}}
    mine = {"name": {"any_": ["tiny"]}, "deployment_id": {"is_null_": True}, "state": running}
    with shell_run(up, tmp_path) as shell:
        while not (found := up.ask("/flow_runs/filter", flow_runs=mine)):
            assert shell.poll() is None, (tmp_path / "said.txt").read_text()
            time.sleep(1)
        run = found[0]["id"]
        assert f"Prefect  {up.ui}\n" in (tmp_path / "said.txt").read_text()
        watch(operator, up, run, before, "ray::Engine", "TrainWorker")
        operator.page.goto("about:blank")
        held = memory(up, before)
        # As docs/operate.md has it.
        command = [sys.executable, "-m", "prefect", "flow-run", "cancel", run]
        settings = {**up.environment, "PREFECT_API_URL": up.facts["prefect_url"]}
        subprocess.run(command, env=settings, cwd=ROOT, check=True)
        wait_for_nothing(up, before, held)
        output, _ = shell.communicate(timeout=CANCEL_SECONDS)
    assert shell.returncode == 130
    assert json.loads(output.splitlines()[-1])["message"] == "cancelled from Prefect"
    assert up.state(run)["type"] == "CANCELLED"
    with shell_run(up, tmp_path) as shell:
        output, _ = shell.communicate(timeout=SECONDS)
    assert shell.returncode == 0, (tmp_path / "said.txt").read_text()
    reused = {stage["name"] for stage in json.loads(output.splitlines()[-1])["stages"] if stage["reused"]}
    assert {"models", "prompts", "warmup-annotate", "warmup-keep"} <= reused


@pytest.mark.long
def test_a_run_cancelled_in_its_training_continues_to_its_artifacts(
    operator: Operator, up: Up, tmp_path: Path, before: set[int]
) -> None:
    page, root = operator.page, tmp_path / "root"
    run = start_from_form(operator, up, tmp_path)
    watch(operator, up, run, before, "ray::Engine", "TrainWorker", "stages/train/")
    cancel(operator, up, run, before)
    again = start_again(operator, up, run)

    # Prefect's server dies in the middle of training, then the worker, and both come back: the run goes on.
    watch(operator, up, again, before, "TrainWorker", "stages/train/")
    up.crash("prefect", "server", "start")
    up.crash("prefect", "worker", "start")
    page.goto("about:blank")
    state = up.wait(again, seconds=SECONDS)
    assert state["type"] == "COMPLETED", state
    assert up.ask(f"/flow_runs/{again}")["name"] == "browser"
    (record,) = (json.loads(path.read_text()) for path in root.glob("runs/*/run.json"))
    reused = {stage["name"] for stage in record["stages"] if stage["reused"]}
    assert {"models", "prompts", "warmup-train", "annotate", "keep"} <= reused
    assert not {"train", "evaluate-before", "evaluate-after", "report"} & reused

    left = up.artifacts(again)
    assert {"plan", "stages", "metrics", "funnel", "signals", "spending", "report", "overview", "summary"} <= set(left)
    signals = {row["signal"]: row for row in json.loads(left["signals"]["data"])}
    assert signals["both"]["shared"] == signals["both"]["queries"] == 12
    # Of the flow itself only the summary, which its page then shows first.
    assert [key for key, artifact in left.items() if artifact["task_run_id"] is None] == ["summary"]
    assert left["progress-train"]["description"].startswith("3 of 3 steps")
    asked = up.artifacts(run)["progress-annotate"]["description"]
    assert "teacher: 24 queries" in asked
    assert " USD; left: " in asked
    page.goto(f"{up.ui}/runs/flow-run/{again}")
    page.get_by_text("Artifacts", exact=True).first.click()
    page.get_by_role("link", name="summary").first.wait_for()
    operator.shoot("artifacts")
    page.get_by_role("link", name="metrics").first.click()
    page.wait_for_url("**/artifacts/artifact/**")
    page.get_by_text("rouge_l").first.wait_for()
    operator.shoot("artifact")
    page.goto(f"{up.ui}/artifacts/artifact/{left['overview']['id']}")
    picture = page.locator("img[src^='data:image/png']").first
    picture.wait_for()
    assert picture.evaluate("image => image.naturalWidth") > 500
    operator.shoot("overview")
    page.goto(f"{up.ui}/runs/flow-run/{again}")
    page.get_by_text("Completed").first.wait_for()
    operator.shoot("run")
    assert all((operator.screenshots / f"{name}.png").stat().st_size > 10_000 for name in ("form", "run", "artifact"))

"""What docs/operate.md does on a deployment's pages, in a real browser. Whole runs are in test_operate."""

from pathlib import Path
from typing import Any

import pytest
from browser import Operator
from machine import Up

SECONDS = 900
SMALL = (
    *("warmup.steps=3", "train.steps=2", "budget.queries=96", "signals.candidates=72", "evaluate.seeds=[1]"),
    "promote.enabled=false",
)
pytestmark = [pytest.mark.browser, pytest.mark.timeout(SECONDS)]


def open_deployment(operator: Operator, name: str) -> dict[str, Any]:
    """Its page, from the list; what the server says of it."""
    operator.page.goto(f"{operator.up.ui}/deployments")
    operator.page.get_by_role("link", name=name, exact=True).first.click()
    operator.page.get_by_role("button", name="Run", exact=True).wait_for()
    return operator.up.deployment(name)


def test_a_deployments_parameters_are_edited(operator: Operator, up: Up) -> None:
    page, before = operator.page, open_deployment(operator, "distill-recurring")
    menu = page.locator(".p-icon-button-menu:not(.deployment-schedule__menu)").locator("visible=true").first
    operator.take_of_menu(menu, "Edit")
    operator.field("root (Optional)").locator("textarea").fill("runs/edited")
    operator.press("Save", f"**/deployments/{up.deployment('distill-recurring')['id']}")
    edited = up.deployment("distill-recurring")
    assert edited["parameters"] == before["parameters"] | {"root": "runs/edited", "approved": False}
    # The page sorts tags, too.
    known = {name: before[name] for name in ("parameters", "tags")}
    up.send("PATCH", f"/deployments/{edited['id']}", known)


def test_a_schedule_is_added(operator: Operator, up: Up) -> None:
    page, id_ = operator.page, open_deployment(operator, "distill-recurring")["id"]

    def add() -> None:
        page.get_by_role("button", name="Schedule", exact=True).click()
        form = page.locator(".p-modal")
        form.get_by_placeholder("Enter a unique identifier").fill("nightly")
        form.get_by_text("Cron", exact=True).click()
        operator.shoot("schedule-form")
        form.locator(".cron-schedule-form__column--span-3 input").fill("0 4 * * *")
        operator.choose(form.locator(".p-select", has_text="UTC"), "Europe / Berlin", typed="Berlin")
        operator.choose(form.locator(".p-select", has_text="Select parameters"), "root")
        page.keyboard.press("Tab")
        operator.field("root (Optional)").locator("textarea").fill("runs/nightly")
        operator.press("Save", "**/schedules")

    operator.insist(add)
    (added,) = (
        schedule for schedule in up.deployment("distill-recurring")["schedules"] if schedule["slug"] == "nightly"
    )
    up.send("DELETE", f"/deployments/{id_}/schedules/{added['id']}")
    assert (added["active"], added["parameters"]) == (True, {"root": "runs/nightly"})
    assert (added["schedule"]["cron"], added["schedule"]["timezone"]) == ("0 4 * * *", "Europe/Berlin")


def test_a_quick_run_starts_at_once(operator: Operator, up: Up) -> None:
    page, id_ = operator.page, open_deployment(operator, "reap")["id"]
    with page.expect_response("**/create_flow_run") as answered:
        operator.take_of_menu(page.get_by_role("button", name="Run", exact=True), "Quick run")
    run = answered.value.json()
    assert run["deployment_id"] == id_
    assert up.wait(run["id"], seconds=SECONDS)["type"] == "COMPLETED"


def test_a_preset_is_chosen_and_changed(operator: Operator, up: Up) -> None:
    operator.open_form()
    config = operator.field("config")
    operator.take_kind(config, "Preset", "Preset")
    operator.choose(operator.field("Preset").locator(".p-select"), "gsm8k")
    config.get_by_text("Add item").click()
    operator.field("Changes (Optional)").locator("textarea").last.fill("train.steps=7")
    operator.shoot("preset")
    run = operator.submit()
    assert up.ask(f"/flow_runs/{run}")["parameters"]["config"] == {"preset": "gsm8k", "changes": ["train.steps=7"]}
    # Its files are not there: the plan says so.
    assert up.wait(run, seconds=SECONDS)["type"] == "FAILED"
    assert up.ask(f"/flow_runs/{run}")["name"] == "gsm8k"
    assert "problems" in up.artifacts(run)


@pytest.mark.long
def test_the_quickstart_goes_through_from_the_form(operator: Operator, up: Up, tmp_path: Path) -> None:
    """In a small size, watched to its end; its artifacts are opened."""
    page = operator.page
    operator.open_form()
    config = operator.field("config")
    operator.take_kind(config, "Preset", "Preset")
    operator.choose(operator.field("Preset").locator(".p-select"), "quickstart")
    for number, change in enumerate(SMALL):
        config.get_by_text("Add item").click()
        # Not the last one: the new one may not be there yet.
        operator.field("Changes (Optional)").locator("textarea").nth(number).fill(change)
    operator.field("root (Optional)").locator("textarea").fill(str(tmp_path / "root"))
    run = operator.submit()
    state = up.wait(run, seconds=SECONDS)
    assert state["type"] == "COMPLETED", state
    page.get_by_text("Completed").first.wait_for()
    operator.shoot("quickstart")
    page.get_by_text("Artifacts", exact=True).first.click()
    page.get_by_role("link", name="summary").first.click()
    page.wait_for_url("**/artifacts/artifact/**")
    page.get_by_text("quickstart").first.wait_for()
    operator.shoot("quickstart-summary")
    assert {"plan", "stages", "metrics", "funnel", "report", "overview", "summary"} <= set(up.artifacts(run))

"""Somebody at a real browser before Prefect's UI."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from machine import Up
from playwright.sync_api import TimeoutError

SETTLE_MS = 2000
TRIES = 10


class Operator:
    """Somebody at the browser, who keeps screenshots."""

    def __init__(self, page: Any, up: Up, screenshots: Path) -> None:
        self.page, self.up, self.screenshots = page, up, screenshots

    def shoot(self, name: str) -> None:
        # What is being loaded or moved would be caught halfway.
        self.page.wait_for_timeout(SETTLE_MS)
        self.page.screenshot(path=self.screenshots / f"{name}.png")

    def open_form(self) -> None:
        """From the list of deployments to the form of a run of one's own."""
        self.page.goto(f"{self.up.ui}/deployments")
        self.page.get_by_role("link", name="distill", exact=True).first.click()
        self.shoot("deployment")
        self.take_of_menu(self.page.get_by_role("button", name="Run", exact=True), "Custom run")
        self.page.wait_for_timeout(SETTLE_MS)

    def take_of_menu(self, menu: Any, entry: str) -> None:
        """Open a menu and choose of it. The page draws itself anew when an answer comes, which closes what is open: one
        opens it again."""
        option = self.page.get_by_text(entry, exact=True).locator("visible=true").first
        for _ in range(TRIES):
            with suppress(TimeoutError):
                if not option.is_visible():
                    menu.click(timeout=SETTLE_MS)
                return option.click(timeout=SETTLE_MS)
        raise AssertionError(f"{entry!r} could not be chosen in {TRIES} tries")

    def insist(self, act: Callable[[], Any]) -> None:
        """Do something from its beginning again where the page, drawing itself anew, closed the form halfway."""
        for _ in range(TRIES):
            with suppress(TimeoutError):
                act()
                return
            self.page.reload()
        raise AssertionError(f"{act.__name__} was tried {TRIES} times")

    def field(self, label: str) -> Any:
        """The innermost part of the form with this label."""
        title = self.page.locator(".schema-form-property__label").get_by_text(label, exact=True)
        return self.page.locator(".schema-form-property").filter(has=title).last

    def take_kind(self, union: Any, kind: str, field: str) -> None:
        """Choose one kind of a union; ``field`` is one that only this kind has. On a loaded machine the page sets the
        deployment's values late, which undoes what was chosen before: one looks, and chooses again."""
        for _ in range(TRIES):
            union.get_by_text(kind, exact=True).first.click()
            self.page.wait_for_timeout(SETTLE_MS)
            if self.field(field).is_visible():
                return
        raise AssertionError(f"{kind!r} was chosen {TRIES} times, and {field!r} is not shown")

    def choose(self, select: Any, option: str, typed: str = "") -> None:
        """Open a list by its keyboard, since the click that focuses it may close it again, and choose of it."""
        select.get_by_role("button").first.focus()
        self.page.keyboard.press("ArrowDown")
        self.page.keyboard.type(typed)
        self.page.locator(".p-select-option", has_text=option).first.click()

    def press(self, button: str, request: str) -> Any:
        """Press a button that sends a request; returns what is answered. A server whose database is busy answers 503,
        of which the page only says that something went wrong: one presses again."""
        while True:
            with self.page.expect_response(request) as answered:
                self.page.get_by_role("button", name=button).click()
            if answered.value.status != 503:
                break
        assert answered.value.ok, answered.value.text()
        return answered.value

    def submit(self) -> str:
        """Start what the form says; returns the flow run's id."""
        run = str(self.press("Submit", "**/create_flow_run").json()["id"])
        # Not by the note that links to it: it moves and goes by itself, and on a loaded machine a click on it is lost.
        self.page.goto(f"{self.up.ui}/runs/flow-run/{run}")
        return run

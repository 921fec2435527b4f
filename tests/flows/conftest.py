"""What tests of this folder share: a machine with everything up, as ``switchyard up`` leaves it, and a browser."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from browser import Operator
from machine import Up
from whole import Finished, finish, start
from witness import PLANTED, Witness

from infra.process import marked


@pytest.fixture(scope="session")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    machine = Up(tmp_path_factory.mktemp("up"))
    try:
        yield machine
    finally:
        machine.switchyard("down")
        assert not list(marked(machine.facts["token"])), "down left processes"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models and settings of a tiny run."""
    folder = tmp_path_factory.mktemp("models")
    tiny.write_config(folder)
    return folder


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        # Chromium refuses its sandbox to root.
        sandbox = os.geteuid() != 0
        browser = playwright.chromium.launch(executable_path=chromium, chromium_sandbox=sandbox)
        found = browser.new_page(viewport={"width": 1400, "height": 1000})
        found.set_default_timeout(60_000)
        yield found
        browser.close()


@pytest.fixture(scope="module")
def operator(page: Any, up: Up, tmp_path_factory: pytest.TempPathFactory) -> Operator:
    given = os.environ.get("SCREENSHOTS")
    return Operator(page, up, Path(given) if given else tmp_path_factory.mktemp("screenshots"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("run")
    config = tiny.write_config(folder)
    with Witness(folder / "root") as witness:
        result = finish(start(config, folder / "root", said=folder / "said.txt", **PLANTED))
    return Finished(config, folder / "root", result, witness, (folder / "said.txt").read_text() + json.dumps(result))

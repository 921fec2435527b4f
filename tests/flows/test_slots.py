"""GPU slots: how many a run needs, when it takes them, and how runs wait for each other at a real server."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
from machine import ROOT, Up

from flows.server import environment
from tasks.config import RunConfig

# A process of its own: Prefect reads its settings when it is imported.
SCRIPT = """
import threading, time
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.states import Cancelling
from flows.ends import StageCancelled, StageRefused
from flows.slots import held, make_slots

NAME = "gpus-of-this-test"
make_slots(NAME, 3)
make_slots(NAME, 9)
client = get_client(sync_client=True)
assert client.read_global_concurrency_limit_by_name(NAME).limit == 3
said, ids, over = [], {}, threading.Event()

@flow
def work(who: str, count: int, name: str = NAME) -> None:
    ids[who] = flow_run.id
    try:
        with held(name, count):
            said.append(who + " begins")
            if who == "first":
                over.wait()
        said.append(who + " ends")
    except StageCancelled:
        said.append(who + " is cancelled")
    except StageRefused as refused:
        said.append(str(refused))

def start(who, count):
    thread = threading.Thread(target=work, args=(who, count))
    thread.start()
    return thread

def until(text):
    deadline = time.monotonic() + 120
    while text not in said:
        assert time.monotonic() < deadline, (text, said)
        time.sleep(0.1)

first = start("first", 2)
until("first begins")
cancelled = start("cancelled", 2)
time.sleep(4)
client.set_flow_run_state(ids["cancelled"], Cancelling(), force=True)
until("cancelled is cancelled")
second = start("second", 3)
beside = start("beside", 1)
until("beside ends")
work("elsewhere", 50, name="no-such-limit")
work("greedy", 4)
time.sleep(3)
assert "second begins" not in said, said
over.set()
until("second ends")
for thread in (first, cancelled, second, beside):
    thread.join()
assert said[:5] == ["first begins", "cancelled is cancelled", "beside begins", "beside ends", "elsewhere begins"], said
assert said.index("first ends") < said.index("second begins"), said
assert said[6] == (
    f"resources.gpu_slots: the run needs 4 GPUs at once, {NAME} has 3 slots: use fewer engines or workers, or raise it "
    f"(prefect gcl update {NAME} --limit 4)"
), said
assert client.read_global_concurrency_limit_by_name(NAME).active_slots == 0
"""


@pytest.mark.timeout(600)
def test_runs_wait_for_each_others_gpus(up: Up, tmp_path: Path) -> None:
    environ = {**os.environ, **environment(tmp_path, up.facts["prefect_url"])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]


def config_of(tmp_path: Path, **changes: Any) -> RunConfig:
    data = {**tiny.settings(tmp_path), "device": "gpu", **changes}
    return RunConfig.model_validate(data)


def test_gpus_that_a_run_has_at_work(tmp_path: Path) -> None:
    from flows.gpus import gpus_at_once

    # Teacher and TA are one model; the student has an engine of its own.
    assert gpus_at_once(config_of(tmp_path)) == 2
    assert gpus_at_once(config_of(tmp_path, device="cpu")) == 0
    training = {"train_workers": 4, "gpus_per_worker": 1}
    assert gpus_at_once(config_of(tmp_path, resources=training)) == 6
    assert gpus_at_once(config_of(tmp_path, resources={**training, "release_engines": True})) == 4
    engine = {"max_model_len": 256, "replicas": 2, "tensor_parallel": 4}
    wide = config_of(tmp_path, engines={"teacher": engine, "assistant": engine})
    assert gpus_at_once(wide) == 9


def test_a_run_takes_its_slots_once_and_gives_them_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import runner
    from tasks.stage import StageSpec

    said: list[Any] = []

    @contextmanager
    def held(name: str, count: int) -> Iterator[None]:
        said.append((name, count))
        yield
        said.append("given back")

    monkeypatch.setattr(runner, "held", held)

    def hold(config: RunConfig, *modules: str) -> list[Any]:
        said.clear()
        found = runner.Runner.open(config, str(tmp_path / "root"))
        monkeypatch.setattr(found, "following", runner.Following(config, "r", found.store, None), raising=False)
        for module in modules:
            found._hold_slots(StageSpec(stage="s", module=module, root="r"))
        found._close(None)
        return list(said)

    config = config_of(tmp_path)
    both = ("tasks.models", "tasks.sample", "tasks.train")
    assert hold(config, *both) == [("switchyard-gpus", 2), "given back"]
    assert hold(config, "tasks.models", "tasks.prompts", "tasks.report") == []
    assert hold(config_of(tmp_path, device="cpu"), *both) == []
    assert hold(config_of(tmp_path, resources={"gpu_slots": None}), *both) == []

"""Whole runs over several Ray nodes, each with an address of its own; nodes that are lost in the middle, and a head."""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from nodes import BUCKET, ROOT, Network, Node, cluster

from benchmarks.chaos import IDS
from infra.manifest import load_manifest
from infra.parts import read_rows
from infra.store import open_store

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(1500)]
SECONDS = 900
STEPS = 240
KINDS = (("engines", "ray::Engine"), ("workers", "ray::RayTrainWorker"), ("teachers", "ray::Trunk"))


@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    with cluster(3) as made:
        yield made


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, net: Network) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    tiny.save_model(folder / "teacher", seed=1)
    data = tiny.settings(folder)
    data["prompts"]["sources"][0]["tasks"][0]["size"] = 160
    data["signals"]["candidates"] = 100
    data["sampling"]["shard_size"] = 4
    data["engines"]["student"] = {**data["engines"]["student"], "replicas": 2}
    data["train"] |= {"steps": STEPS, "checkpoint_every": 20, "validate_every": 80}
    data["resources"] = {"ray_address": net.jobs, "train_workers": 3, "min_train_workers": 1}
    path = folder / "nodes.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


class Run:
    """``switchyard run`` on this machine, beside the cluster."""

    def __init__(self, net: Network, config: Path, name: str, *changes: str) -> None:
        self.store, self.log = open_store(f"s3://{BUCKET}/{name}"), config.parent / f"{name}.log"
        command = [sys.executable, "-m", "flows.cli", "run", str(config), "--root", self.store.uri, "--json"]
        command += [word for change in changes for word in ("--set", change)]
        token = {name: net.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
        environment = {**os.environ, **token, "SWITCHYARD_HOME": str(config.parent / "home")}
        with self.log.open("w") as said:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=said
            )

    def result(self) -> dict[str, Any]:
        output, _ = self.process.communicate(timeout=SECONDS)
        assert self.process.returncode == 0, self.log.read_text()[-3000:] + output
        found: dict[str, Any] = json.loads(output.splitlines()[-1])
        return found

    def until(self, what: str, found: Callable[[], Any]) -> Any:
        """What is looked for, once it is there."""
        deadline = time.monotonic() + SECONDS
        while not (seen := found()):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, f"no {what}"
            time.sleep(0.1)
        return seen

    def stored(self, folder: str, pattern: str) -> list[str]:
        """Paths below a folder that match, once there are any."""
        found: list[str] = self.until(
            pattern, lambda: [path for path in self.store.list(folder) if re.search(pattern, path)]
        )
        return found

    def checkpoint(self, after: int = 0) -> int:
        """The step of a checkpoint of stage 2 past a step."""

        def newest() -> int:
            steps = [0]
            for path in self.store.list("stages/train"):
                # What Ray Train removes meanwhile is not there any more.
                with suppress(FileNotFoundError):
                    if path.endswith("/sums.json"):
                        steps.append(json.loads(self.store.read(path))["step"])
            return max(steps) if max(steps) > after else 0

        step: int = self.until("checkpoint", newest)
        return step

    def rows(self, outcome: dict[str, Any]) -> dict[str, Counter[str]]:
        """By stage and table: how often each row is there."""
        found = {}
        for stage in outcome["stages"]:
            manifest = load_manifest(self.store, f"stages/{stage['name']}/{stage['fingerprint']}/manifest.json")
            for table, entry in manifest.tables.items():
                columns = [name for name in IDS if name in entry.arrow_schema.names]
                rows = read_rows(self.store, manifest, table, columns).to_pylist()
                found[f"{stage['name']}/{table}"] = Counter(map(json.dumps, rows))
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def begun() -> Iterator[list[Run]]:
    """What is to be ended with the test."""
    runs: list[Run] = []
    yield runs
    for run in runs:
        run.close()


@pytest.fixture(scope="module")
def quiet(net: Network, config: Path) -> dict[str, Any]:
    """An undisturbed run's rows by table, and where its models were. Engines serve its teacher to training, which
    decides no row: in the other run every worker has it in memory."""
    run = Run(net, config, "quiet", "resources.placement.teacher=served")
    places: dict[str, set[str]] = {"engines": set(), "workers": set(), "teachers": set()}
    try:
        while run.process.poll() is None:
            for node in net.nodes:
                for kind, name in KINDS:
                    if node.running(name):
                        places[kind].add(node.address)
            time.sleep(0.5)
        return {"rows": run.rows(run.result()), **places}
    finally:
        run.close()


def test_a_run_uses_all_nodes_but_its_head(net: Network, quiet: dict[str, Any]) -> None:
    workers = {node.address for node in net.nodes[1:]}
    # Not onto the head.
    assert quiet["engines"] <= workers
    assert len(quiet["engines"]) > 1
    assert quiet["workers"] == workers
    # One engine for workers on three nodes.
    assert len(quiet["teachers"]) == 1
    assert quiet["teachers"] < workers
    assert len(quiet["rows"]["student-sample/samples"]) == 300
    assert len(quiet["rows"]["train/steps"]) == STEPS
    # Rows of a prompt, each once; figures of a report have no identity of their own.
    prompts = [counts for counts in quiet["rows"].values() if any('"prompt_id"' in row for row in counts)]
    assert len(prompts) > 10
    assert all(set(counts.values()) == {1} for counts in prompts)


def at_work(net: Network, name: str, gone: list[Node]) -> list[Node]:
    return [node for node in net.nodes[1:] if node not in gone and node.running(name)]


def test_nodes_and_the_head_are_lost_and_no_row_is(
    net: Network, config: Path, quiet: dict[str, Any], begun: list[Run]
) -> None:
    run = Run(net, config, "disturbed")
    begun.append(run)
    run.stored("stages/student-sample", r"/samples/\d+\.json$")
    first = run.until("engine at work", lambda: at_work(net, "ray::Engine.generate", []))[0]
    first.cut()
    net.add()
    # Before Ray knows of the loss, others went on.
    step = run.checkpoint()
    second = run.until("three workers", lambda: at_work(net, "ray::RayTrainWorker", [first]))[-1]
    assert len(at_work(net, "ray::RayTrainWorker", [first])) == 3
    second.cut()
    gone = [first, second]
    later = run.checkpoint(after=step + 20)
    assert len(at_work(net, "ray::RayTrainWorker", gone)) == 2
    net.head.kill()
    for node in net.nodes:
        node.end()
    net.start_head()
    for node in net.nodes[1:]:
        if node not in gone:
            net.join(node)
    found = run.result()
    assert later < STEPS
    assert run.rows(found) == quiet["rows"]
    assert "does not answer" not in run.log.read_text()

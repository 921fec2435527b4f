"""What a Ray cluster has too little of for given settings, asked of a real head that claims GPUs."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from machine import ROOT

from flows.capacity import autoscaled, cluster_capacity, gpu_memory, lacking
from infra.cluster import QUIET, START_SECONDS, free_port, head_command, token_environment
from infra.process import Guarded
from tasks.config import RunConfig

Make = Callable[..., RunConfig]
# As Kubernetes' older autoscaler and the cluster launcher name what they bring.
NAMED = {"autoscalerReport": {"nodeTypeMapping": {"10.0.0.7": "one-gpu"}}}
HUGE = {"type": "fresh", "layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "heads": 64}


@pytest.fixture
def config(models: Path) -> Make:
    """Two engines of one GPU, teacher's and student's, and a training worker on another."""

    def make(student: dict[str, Any] | None = None, parallel: int = 1, **resources: Any) -> RunConfig:
        data = tiny.settings(models)
        if student:
            data["models"]["student"] = {**student, "tokenizer_of": data["models"]["teacher"]}
        data["engines"]["student"] = {**data["engines"]["student"], "tensor_parallel": parallel}
        resources = {"gpus_per_worker": 1, **resources}
        return RunConfig.model_validate({**data, "device": "gpu", "resources": resources})

    return make


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[str, dict[str, str]]]:
    """Address and token of a head of 8 CPUs and 4 GPUs of 16 GB, which nobody looks for."""
    folder, port, token = Path(tempfile.mkdtemp(prefix="switchyard-ray-", dir="/tmp")), free_port(), token_environment()
    command = [*head_command(port, folder, free_port()), "--num-cpus=8", "--num-gpus=4"]
    server = Guarded([*command, '--resources={"accelerator_type:T4": 1}'], folder / "head.log", {**QUIET, **token})
    address, headers = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {token['RAY_AUTH_TOKEN']}"}
    deadline = time.monotonic() + START_SECONDS
    try:
        while not has_reported(address, headers):
            assert server.alive, server.tail()
            assert time.monotonic() < deadline, server.tail()
            time.sleep(0.5)
        yield address, token
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def has_reported(address: str, headers: dict[str, str]) -> bool:
    try:
        reply = httpx.get(f"{address}/api/cluster_status", headers=headers, timeout=10)
    except httpx.HTTPError:
        return False
    return reply.status_code == 200 and bool((reply.json()["data"]["clusterStatus"] or {}).get("autoscalerReport"))


@pytest.mark.timeout(400)
def test_a_cluster_is_asked(head: tuple[str, dict[str, str]], models: Path, config: Make) -> None:
    address, token = head
    headers = {"Authorization": f"Bearer {token['RAY_AUTH_TOKEN']}"}
    assert cluster_capacity(config(), address, headers) == ([], False)
    (line,), _ = cluster_capacity(config(train_workers=4), address, headers)
    assert line.startswith("resources: the run takes 6 GPUs at once, the cluster's nodes have 4: add nodes, set resour")
    with pytest.raises(httpx.HTTPStatusError):
        cluster_capacity(config(), address, {})

    command = [sys.executable, "-m", "flows.cli", "doctor", str(models / "tiny.yaml"), "--root", str(models / "root")]
    for setting in ("device=gpu", f"resources.ray_address={address}", "resources.gpus_per_worker=1"):
        command += ["--set", setting]
    known = {**os.environ, **token, "SWITCHYARD_HOME": str(models), "COLUMNS": "200"}
    known.pop("PREFECT_API_URL", None)
    for workers, code in ((1, 0), (4, 2)):
        asked = [*command, "--set", f"resources.train_workers={workers}", "--json"]
        done = subprocess.run(asked, env=known, cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert done.returncode == code, done.stdout + done.stderr
        said = json.loads(done.stdout.splitlines()[-1])
        assert (said["checks"]["cluster's capacity"], said["notes"]) == (workers == 1, [])
        assert said["problems"] == ([] if workers == 1 else [line])


def test_nodes_are_compared_with_what_stages_take(config: Make) -> None:
    node = {"CPU": 8.0, "GPU": 2.0, "accelerator_type:T4": 1.0}
    assert lacking(config(), [node, node]) == []
    # Fewer workers than asked for may begin.
    assert lacking(config(train_workers=8, min_train_workers=2), [node, node]) == []
    assert [line.split(":")[0] for line in lacking(config(parallel=4), [node, node, node])] == [
        "engines.student.tensor_parallel"
    ]
    cpus, gpus = lacking(config(release_engines=True), [])
    assert cpus.startswith("resources: the run takes 2 CPUs at once, the cluster's nodes have 0: add nodes, or lower")
    assert "takes 2 GPUs" in gpus
    # Engines on CPU ask for no CPU.
    plain = RunConfig.model_validate({**config().model_dump(), "device": "cpu", "resources": {"train_workers": 2}})
    assert lacking(plain, [{"CPU": 2.0}]) == []
    assert len(lacking(plain, [{"CPU": 1.0}])) == 1


def test_a_gpu_that_is_too_small_is_told_where_its_size_is_known(config: Make) -> None:
    node = {"CPU": 64.0, "GPU": 8.0}
    assert lacking(config(HUGE), [node]) == []
    found = lacking(config(HUGE), [{**node, "accelerator_type:T4": 1.0}])
    assert [line.split(":")[0] for line in found] == ["models.student", "warmup", "train"]
    assert found[0].endswith(
        "its weights take 145 GiB of each GPU, an engine gets 85% of 16: raise engines.student.tensor_parallel, or "
        "use larger GPUs"
    )
    # Spread over enough GPUs of another kind it fits.
    nodes = [{**node, "accelerator_type:H200": 1.0}] * 4
    assert lacking(config(HUGE, parallel=2, train_workers=16), nodes) == []
    assert gpu_memory([{**node, "accelerator_type:A100": 1.0, "accelerator_type:A100-40G": 1.0}]) == 40
    assert gpu_memory([*nodes, node]) is None


def test_an_autoscaler_is_known_by_its_nodes_types() -> None:
    assert not autoscaled({"autoscalerReport": {"nodeTypeMapping": {"ab12": "node_ab12"}}})
    assert autoscaled(NAMED)
    assert autoscaled(None)

"""An evaluation over two Ray nodes, one of which is cut off while its engine answers: every row is there once."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from nodes import BUCKET, ROOT, Network, cluster

from infra.manifest import load_manifest
from infra.parts import read_rows
from infra.store import open_store

SECONDS = 600
PROBLEMS, SEEDS = 320, 3


@pytest.fixture
def net() -> Iterator[Network]:
    with cluster(2) as made:
        yield made


def settings(folder: Path, jobs: str) -> dict[str, Any]:
    tiny.save_model(folder / "model", seed=1)
    tasks = [{"name": "chain_sum", "size": 2 * PROBLEMS, "options": {"min_terms": 2, "max_terms": 3}}]
    return {
        "name": "nodes",
        "model": {"type": "huggingface", "id": str(folder / "model")},
        "problems": [{"type": "reasoning_gym", "seed": 5, "tasks": tasks}],
        "count": PROBLEMS,
        "max_prompt_tokens": 96,
        "evaluate": {"seeds": list(range(SEEDS)), "max_tokens": 64, "bootstrap": 200},
        "engine": {"max_model_len": 256, "kv_cache_gib": 0.05, "max_num_seqs": 8, "replicas": 2},
        "resources": {"ray_address": jobs},
    }


@pytest.mark.timeout(SECONDS)
def test_a_node_that_is_cut_off_costs_no_row(net: Network, tmp_path: Path) -> None:
    root = f"s3://{BUCKET}/root"
    token = {name: net.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    command = [sys.executable, str(Path(__file__).with_name("measuring.py")), str(tmp_path), root]
    with (tmp_path / "said.txt").open("w") as said:
        run = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **token, "PYTHONPATH": str(ROOT)},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
        )
    try:
        assert run.stdin
        run.stdin.write(json.dumps(settings(tmp_path, net.jobs)))
        run.stdin.close()
        while not (working := [node for node in net.nodes[1:] if node.running("ray::Engine.generate")]):
            assert run.poll() is None, (tmp_path / "said.txt").read_text()[-3000:]
            time.sleep(0.05)
        working[0].cut()
        assert run.stdout
        row = json.loads(run.stdout.read().splitlines()[-1])
        assert run.wait() == 0
    finally:
        run.kill()
    assert row["model"] == "nodes"
    store = open_store(root)
    (path,) = (path for path in store.list("stages/evaluate") if path.endswith("/manifest.json"))
    rows = read_rows(store, load_manifest(store, path), "evaluations", ["prompt_id", "sample_index"]).to_pylist()
    counts = Counter((row["prompt_id"], row["sample_index"]) for row in rows)
    assert len(counts) == PROBLEMS * SEEDS
    assert set(counts.values()) == {1}

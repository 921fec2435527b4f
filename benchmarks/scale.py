"""From 1 node to 64, and from 10⁵ prompts to 10⁷: what the scheduler, the store and Ray cost when engines are timed.

    python -m benchmarks.scale --json

The sampling stage runs as in any run: a flow, Prefect's task, a Ray job, the queue of shards, actors, parts and records
on disk. Only engines are replaced, by actors that wait as long as an H100 would write and answer with as many tokens
(``benchmarks/timed_engine.py``, one engine a node). Efficiency is the time the work takes on engines that are never
idle, over the time it took from the first call to the last committed part; loading models is not in it.

64 nodes get ten shards of a minute each, in real time. Fewer nodes get ten shards of some seconds, of shorter answers,
and so do 16 with one engine of half the speed. For 10⁵ prompts and more, answers are a few tokens and time is
compressed, so that the head is what limits: there its CPU time, memory and requests are looked at, not the efficiency.
"""

import hashlib
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.conditions import conditions, options, publish
from benchmarks.meter import Peak
from benchmarks.timed_engine import SEQUENCES, SOURCE, SPREAD, TOKENS_PER_SECOND
from flows.server import EmbeddedServer
from infra.manifest import commit_manifest, load_manifest
from infra.models import ModelRef
from tasks import schemas
from tasks.config import load_config
from tasks.stage import Stage, StageSpec

STAGE = "benchmarks.timed_stage"
CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
SAMPLES, TOKENS, SHORT_TOKENS, SHARDS = 5, 200, 40, 10
FEW_TOKENS, COMPRESSION = 8, 10.0
# Shards of one part of the prompts.
PART_SHARDS = 16


@dataclass(frozen=True)
class Case:
    """One run of the stage."""

    nodes: int
    prompts: int
    shard_size: int
    samples: int = SAMPLES
    tokens: int = TOKENS
    compression: float = 1.0
    speeds: dict[int, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """On engines that are never idle."""
        work = self.prompts * self.samples * self.tokens / TOKENS_PER_SECOND / self.compression
        return work / (self.nodes - len(self.speeds) + sum(self.speeds.values()))


def timed(nodes: int, seconds: float, tokens: int = SHORT_TOKENS, **more: Any) -> Case:
    """Ten shards of so many seconds for every node."""
    size = round(seconds * TOKENS_PER_SECOND / (SAMPLES * tokens))
    return Case(nodes, nodes * SHARDS * size, size, tokens=tokens, **more)


def prompts_of(first: int, count: int) -> pa.Table:
    """So many prompts of some hundred bytes."""
    ids = [hashlib.blake2b(str(first + number).encode(), digest_size=8).hexdigest() for number in range(count)]
    texts = [
        f"Question {name}: how many of {name[:3]} are there in {name[3:]}, and what follows of it?" for name in ids
    ]
    turns = pa.StructArray.from_arrays([pa.array(["user"] * count), pa.array(texts)], fields=list(schemas.MESSAGE))
    columns = {
        "prompt_id": ids,
        "source": ["timed"] * count,
        "messages": pa.ListArray.from_arrays(pa.array(np.arange(count + 1), pa.int32()), turns),
        "verifier": ["none"] * count,
    }
    for name in schemas.PROMPT.names:
        columns.setdefault(name, pa.nulls(count, schemas.PROMPT.field(name).type))
    return pa.table({name: columns[name] for name in schemas.PROMPT.names}, schema=schemas.PROMPT)


def inputs(root: str, case: Case) -> dict[str, str]:
    """Manifests of a model and of the prompts, as earlier stages leave them."""
    found = {}
    for name in ("models", "prompts"):
        spec = StageSpec(
            stage=name, module=f"tasks.{name}", settings={"prompts": case.prompts, "size": case.shard_size}, root=root
        )
        stage: Stage[Any] = Stage(spec, None)  # type: ignore[arg-type]
        if not stage.store.exists(spec.manifest_path):
            if name == "models":
                stage.facts["models"] = {"student": ModelRef(name="timed", revision="1").model_dump()}
            else:
                rows = PART_SHARDS * case.shard_size
                for number, first in enumerate(range(0, case.prompts, rows)):
                    stage.commit("candidates", number, prompts_of(first, min(rows, case.prompts - first)))
                stage.close_table("candidates", schemas.PROMPT)
            commit_manifest(stage.store, stage.manifest)
        found[name] = spec.manifest_path
    return found


def measured(runner: Any, case: Case) -> dict[str, Any]:
    """What one case took."""
    # Tables of millions of rows are made in a process of their own: this one's memory is measured.
    with ProcessPoolExecutor(1, get_context("spawn")) as maker:
        places = maker.submit(inputs, runner.store.uri, case).result()
    settings = {
        "role": "student",
        "engine": "student",
        "table": "candidates",
        "sampling": {"temperature": 0.7, "top_p": 1.0, "max_tokens": case.tokens, "samples": case.samples},
        "shard_size": case.shard_size,
        "nodes": case.nodes,
        "speeds": case.speeds,
        "compression": case.compression,
        "tokens": case.tokens,
    }
    with Peak() as peak:
        path = runner.stage("timed", STAGE, settings, **places)
    manifest = load_manifest(runner.store, path)
    facts, rows = manifest.facts, manifest.tables["samples"].rows
    assert rows == case.prompts * case.samples
    found = {
        "prompts": case.prompts,
        "rows": rows,
        "shards": len(manifest.tables["samples"].parts),
        "compression": case.compression,
        "seconds": facts["engine_seconds"],
        "efficiency": round(case.seconds / facts["engine_seconds"], 4),
        "head_cpu_seconds": facts["head_cpu_seconds"],
        "head_microseconds_per_row": round(1e6 * facts["head_cpu_seconds"] / rows, 1),
        "stage_peak_mib": facts["peak_mib"],
        "flow_peak_mib": round(peak.most / 2**20, 1),
        "requests_per_row": sum(facts["requests"].values()) / rows,
        "requests": facts["requests"],
    }
    print({"nodes": case.nodes, **found}, file=sys.stderr, flush=True)
    return found


def all_of(root: Path, cases: dict[str, Case]) -> dict[str, Any]:
    """Every case, in one flow."""
    from prefect import flow

    from flows.runner import Runner

    @flow(name="scale", validate_parameters=False)
    def scale() -> dict[str, Any]:
        with Runner.open(load_config(CONFIG), str(root)) as runner:
            # The first stage starts the Ray head.
            measured(runner, Case(1, 100, 100, compression=100))
            return {name: measured(runner, case) for name, case in cases.items()}

    return scale()


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--shard-seconds", type=float, default=60.0, help="seconds of a shard on the most nodes")
    parser.add_argument("--short-seconds", type=float, default=2.0, help="seconds of a shard on fewer")
    parser.add_argument("--prompts", type=int, nargs="*", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--folder", help="work here; default: a temporary folder")
    arguments = parser.parse_args()
    most, some = max(arguments.nodes), min(max(arguments.nodes), 16)
    cases = {str(nodes): timed(nodes, arguments.short_seconds) for nodes in arguments.nodes}
    cases[str(most)] = timed(most, arguments.shard_seconds, TOKENS)
    slow = timed(some, arguments.short_seconds, speeds={0: 0.5})
    many = {
        f"{prompts} prompts": Case(
            most, prompts, min(8192, prompts // most), samples=1, tokens=FEW_TOKENS, compression=COMPRESSION
        )
        for prompts in arguments.prompts
    }
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="switchyard-scale-", dir=arguments.folder) as folder:
        server = EmbeddedServer(Path(folder) / "prefect")
        # Prefect reads its settings when it is imported.
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "WARNING")
        server.start()
        try:
            server.wait()
            found = all_of(Path(folder) / "root", {**cases, "slow": slow, **many})
        finally:
            server.stop()
    by_nodes = {
        name: {
            "efficiency": found[name]["efficiency"],
            "head_cpu_seconds": found[name]["head_cpu_seconds"],
            "flow_peak_mib": found[name]["flow_peak_mib"],
            "stage_peak_mib": found[name]["stage_peak_mib"],
            "store_requests": sum(found[name]["requests"].values()),
            "shard_seconds": arguments.shard_seconds if name == str(most) else arguments.short_seconds,
            "seconds": found[name]["seconds"],
        }
        for name in cases
    }
    result = {
        "conditions": conditions(),
        "efficiency_by_nodes": by_nodes,
        "flow_peak_mib": max(entry["flow_peak_mib"] for entry in found.values()),
        "store_requests_per_row": {
            str(found[name]["rows"]): round(found[name]["requests_per_row"], 7) for name in [*cases, *many]
        },
        "one_at_half_speed": found["slow"],
        "by_prompts": {str(case.prompts): found[name] for name, case in many.items()},
        "model": {
            "source": SOURCE,
            "tokens_per_second": TOKENS_PER_SECOND,
            "sequences_at_once": SEQUENCES,
            "spread": SPREAD,
            "tokens_an_answer": {"of a minute": TOKENS, "shorter": SHORT_TOKENS, "by_prompts": FEW_TOKENS},
            "answers_a_prompt": SAMPLES,
        },
        "seconds": round(time.monotonic() - began),
    }
    for name, entry in by_nodes.items():
        print(f"{name} nodes: efficiency {entry['efficiency']:.3f}, head {entry['head_cpu_seconds']:.1f} s of CPU time")
    for name, entry in result["by_prompts"].items():
        print(
            f"{name} prompts: head {entry['head_microseconds_per_row']} µs a row, stage {entry['stage_peak_mib']} MiB, "
            f"flow {entry['flow_peak_mib']} MiB, {entry['requests_per_row']:.6f} requests a row"
        )
    publish("scale", result, arguments)


if __name__ == "__main__":
    main()

"""Random kills over whole runs: is a row lost or doubled, is work done twice?

    python -m benchmarks.chaos --kills 50 --json

A tiny run goes through once, undisturbed. Then the same settings run in another folder, where after a random number of
commits and some random seconds one process of a random kind gets ``kill -9``: the flow, a stage's job, the engine room,
an engine, a training worker, Ray's head, Prefect's server. A run that ends of it is started again; one that completes
before all kills are spent is followed by another. At last ``switchyard run`` goes through, and rows are compared with
the undisturbed run's.

A shard counts as redone where an engine begins it again; the first kill after which that happens is its cause. Engines
note what they begin: ``chaos_site/sitecustomize.py``.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from benchmarks.conditions import conditions, options, publish
from tests.flows import tiny
from tests.flows.kills import kinds

IDS = ("source", "sample_id", "row_id", "prompt_id", "sample_index", "label", "step", "position")
RUN_SECONDS = 1800.0
# A kill falls so many seconds after a commit at most: in the middle of something, or where something starts.
MOMENTS = 6.0


@dataclass
class Begun:
    """A shard that an engine began."""

    at: float
    engine: str
    shard: str


@dataclass
class Chaos:
    """Whole runs in one folder, and what befell them."""

    folder: Path
    config: Path
    random: random.Random
    kills: list[tuple[float, str]] = field(default_factory=list)

    def start(self, root: Path, trace: Path) -> subprocess.Popen[str]:
        site = str(Path(__file__).parent / "chaos_site")
        paths = os.pathsep.join([site, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": paths, "CHAOS_TRACE": str(trace)}
        environment["SWITCHYARD_HOME"] = str(self.folder / "home")
        command = [sys.executable, "-m", "flows.cli", "run", str(self.config), "--root", str(root), "--json"]
        log = (self.folder / "log").open("a")
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)

    def whole(self, root: Path, trace: Path) -> dict[str, Any]:
        """A run left alone; its outcome."""
        output, _ = self.start(root, trace).communicate(timeout=RUN_SECONDS)
        lines = output.splitlines() or ['{"state": "Failed", "stages": []}']
        outcome: dict[str, Any] = json.loads(lines[-1])
        return outcome

    def disturbed(self, root: Path, trace: Path, kills: int, commits: int) -> None:
        """Run and kill until it ends by itself or so many kills are spent."""
        while True:
            run, before = self.start(root, trace), len(self.kills)
            while len(self.kills) < kills and self.wait(run, root, self.random.randint(0, 2 * commits)):
                self.kill(run)
            ended_well = run.wait(RUN_SECONDS) == 0
            wait_until_gone(run.pid, root)
            if ended_well or len(self.kills) in (before, kills):
                return

    def wait(self, run: subprocess.Popen[str], root: Path, commits: int) -> bool:
        """Whether the run is still there when it has committed so often, and some more moments have gone by."""
        enough = committed(root) + commits
        while run.poll() is None and committed(root) < enough:
            time.sleep(0.1)
        with suppress(subprocess.TimeoutExpired):
            run.wait(self.random.uniform(0, MOMENTS))
        return run.poll() is None

    def kill(self, run: subprocess.Popen[str]) -> None:
        """``kill -9`` of one process of a random kind, of those that are there."""
        found: dict[str, list[psutil.Process]] = {"flow": [psutil.Process(run.pid)]}
        for kind, process in kinds(run.pid):
            found.setdefault(kind, []).append(process)
        kind = self.random.choice(sorted(found))
        with suppress(psutil.NoSuchProcess):
            self.random.choice(found[kind]).kill()
            self.kills.append((time.time(), kind))
            print(f"{len(self.kills)}: {kind}", file=sys.stderr, flush=True)


def committed(root: Path) -> int:
    """Commit records and manifests that stand."""
    return sum(1 for _ in root.glob("stages/**/*.json"))


def wait_until_gone(flow: int, root: Path) -> None:
    """Return when nothing works on the root any more: a killed flow's guards end its processes."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        left = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if str(root) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    left.append(process.pid)
        if not left:
            return
        time.sleep(0.2)
    raise RuntimeError(f"processes of {root} outlived their flow {flow}: {left}")


def rows_of(root: Path, outcome: dict[str, Any]) -> dict[str, Counter[str]]:
    """By stage and table: how often each row is there, as others read it, by pattern."""
    found = {}
    for stage in outcome["stages"]:
        folder = root / "stages" / stage["name"] / stage["fingerprint"]
        for table in stage["rows"]:
            counts: Counter[str] = Counter()
            for part in sorted((folder / table).glob("*.parquet")):
                file = pq.ParquetFile(part)
                columns = [name for name in IDS if name in file.schema_arrow.names]
                counts.update(json.dumps(row) for row in file.read(columns).to_pylist())
            found[f"{stage['name']}/{table}"] = counts
    return found


def begun(trace: Path) -> list[Begun]:
    entries = []
    for file in trace.glob("*.jsonl"):
        # A killed engine's last line may be cut off: that shard had not begun.
        for line in file.read_text().splitlines():
            with suppress(ValueError):
                entries.append(Begun(**json.loads(line)))
    return sorted(entries, key=lambda entry: entry.at)


def redone(entries: list[Begun], kills: list[tuple[float, str]]) -> int:
    """The most shards that one engine began again after one kill."""
    seen: set[tuple[str, str]] = set()
    again: Counter[tuple[int, str]] = Counter()
    for entry in entries:
        if (entry.engine, entry.shard) in seen:
            cause = sum(at < entry.at for at, _ in kills)
            again[cause, entry.engine] += 1
        seen.add((entry.engine, entry.shard))
    return max(again.values(), default=0)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--commits", type=int, default=4, help="mean number of commits between two kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep everything here; a finished undisturbed run in it is reused")
    arguments = parser.parse_args()
    folder = made(
        arguments.folder.absolute() if arguments.folder else Path(tempfile.mkdtemp(prefix="switchyard-chaos-"))
    )
    config = folder / "tiny.yaml"
    # Models are written once: their files' times and bytes are part of what a run is named by.
    chaos = Chaos(folder, config if config.exists() else tiny.write_config(folder), random.Random(arguments.seed))
    lost = doubled = most = rounds = 0
    identical, state = True, "Completed"
    try:
        quiet = chaos.whole(folder / "quiet", made(folder / "quiet-trace"))
        expected = rows_of(folder / "quiet", quiet)
        assert redone(begun(folder / "quiet-trace"), []) == 0, "an undisturbed run begins every shard once"
        while len(chaos.kills) < arguments.kills:
            root, trace, before = folder / f"root-{rounds}", made(folder / f"trace-{rounds}"), len(chaos.kills)
            rounds += 1
            chaos.disturbed(root, trace, arguments.kills, arguments.commits)
            outcome = chaos.whole(root, trace)
            state = outcome["state"] if state == "Completed" else state
            found = rows_of(root, outcome)
            lost += sum((expected[name] - found.get(name, Counter())).total() for name in expected)
            doubled += sum((counts - expected.get(name, Counter())).total() for name, counts in found.items())
            identical &= found == expected
            most = max(most, redone(begun(trace), chaos.kills[before:]))
    finally:
        if not arguments.folder:
            shutil.rmtree(folder, ignore_errors=True)
    result = {
        "conditions": conditions(),
        "kills": len(chaos.kills),
        "lost_rows": lost,
        "duplicate_rows": doubled,
        "identical_ids": identical,
        "max_shards_redone_per_kill": most,
        "state": state,
        "whole_runs": rounds,
        "killed": dict(Counter(kind for _, kind in chaos.kills)),
        "seed": arguments.seed,
        "commits_between_kills": arguments.commits,
    }
    print(
        f"{result['kills']} kills over {rounds} runs: {lost} rows lost, {doubled} doubled, {most} shards redone at most"
    )
    publish("chaos", result, arguments)


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    main()

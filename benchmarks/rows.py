"""Memory by rows: the stages between prompts and training, on 10⁴ to 10⁷ sampled rows.

    python -m benchmarks.rows --json
    python -m benchmarks.rows --rows 20000000 --last select       whether what grew up to 10⁷ has reached its bound

The story of ``flows/distill.py`` is followed as a run follows it, each stage in a process of its own, on a file of
prompts with five student samples and one annotation each. Engines are replaced, in the stage's process, by answers made
at once (``Instant``), and a training stage by one worker's reading of its rows in the order of training; it ends before
evaluation, whose rows are the held-out prompts. What is measured is each process's largest anonymous resident memory,
MiB, looked at every 20 ms: libraries are in it, so flat means that it stays where it was; pages of mapped files are
not, the system takes them back when it needs them. What plans the run is measured beside.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from benchmarks.conditions import conditions, options, publish
from tests.flows import tiny

COUNTS = (10_000, 100_000, 1_000_000, 3_000_000, 10_000_000)
SAMPLES, TOKENS = 5, 12
MIB = 1 << 20
# Modules in which stages take hold of engines.
ASKING = ("tasks.sample", "tasks.select", "tasks.keep")


class Instant:
    """An engine's access and pool that answers at once: numbers that differ from sample to sample, confidences too."""

    def pool(self, role: str, model: Any) -> "Instant":
        return self

    def map(self, calls: Iterable[Any], repeats: Any = None) -> Iterator[tuple[Any, Any]]:
        for key, call in filter(None, calls):
            yield key, getattr(self, call.method)(*call.arguments)

    def choice(self, model: dict[str, Any], questions: list[str]) -> list[float]:
        return [(hash(question) % 1000 + 0.5) / 1000 for question in questions]

    def generate(self, model: dict[str, Any], conversations: list[Any], seeds: list[list[int]]) -> pa.Table:
        from infra.engine import ANSWERS

        flat = [seed for own in seeds for seed in own]
        columns = {
            "conversation": [number for number, own in enumerate(seeds) for _ in own],
            "seed": flat,
            "prompt_token_ids": [list(range(3, 43))] * len(flat),
            "token_ids": [[3 + (seed >> place) % 250 for place in range(TOKENS)] for seed in flat],
            "text": [f"We add them one by one. Answer: {seed % 4}" for seed in flat],
            "finish_reason": ["stop"] * len(flat),
        }
        for field in ANSWERS:
            columns.setdefault(field.name, pa.nulls(len(flat), field.type))
        return pa.table({name: columns[name] for name in ANSWERS.names}, schema=ANSWERS)


@contextmanager
def instant(stage: Any) -> Iterator[Instant]:
    yield Instant()


class Peak(threading.Thread):
    """The largest anonymous memory of this process since the start, bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over, self.bytes = threading.Event(), 0

    def run(self) -> None:
        while not self.over.wait(0.02):
            with open("/proc/self/status") as lines:
                now = next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            self.bytes = max(self.bytes, now)


def write_prompts(path: Path, count: int) -> None:
    with path.open("w") as file:
        for number in range(count):
            question = f"Mrs Baker sells {number} loaves on Monday and {number % 7} more on Tuesday. How many in all?"
            file.write(json.dumps({"prompt": question, "answer": str(number % 4)}) + "\n")


def config(folder: Path, prompts: int) -> Path:
    """Settings of a run in which every prompt is sampled and annotated."""
    tiny.save_model(folder / "teacher", seed=1)
    data = tiny.settings(folder)
    fields = {"prompt": "prompt", "answer": "answer"}
    data["prompts"]["sources"] = [{"type": "jsonl", "path": str(folder / "prompts.jsonl"), "fields": fields}]
    data["budget"]["queries"], data["budget"]["warmup_share"] = prompts - data["prompts"]["heldout"], 0.1
    data["sampling"]["student"]["samples"], data["sampling"]["shard_size"] = SAMPLES, 256
    data["sampling"].pop("distributions")
    data["signals"].pop("candidates")
    data["train"]["method"] = data["warmup"]["method"]
    path = folder / "rows.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def read_rows_of(stage: Any) -> None:
    """What a worker of a training stage reads, in its order, once through; and a manifest that names a student."""
    from tasks.batches import Order, row_sequence
    from tasks.data import read_data

    settings, train = stage.settings, stage.settings.train
    data = read_data(
        stage.store,
        [stage.input(name) for name in settings.rows],
        seed=settings.seed,
        validation_share=train.validation_share,
        max_length=train.max_length,
        max_new_tokens=0,
    )
    order = Order(data.rows.num_rows, settings.seed, "rows")
    stage.facts["tokens"] = sum(len(row_sequence(data.rows, order.at(k)[0])) for k in range(data.rows.num_rows))
    student = settings.student_input
    stage.facts["models"] = {"student": stage.input(student).facts["models"]["student"]}


def perform(place: str) -> None:
    """In a process of its own: one stage."""
    from infra.manifest import commit_manifest
    from tasks.stage import Stage, StageSpec

    spec = StageSpec.model_validate_json(Path(place).read_text())
    module = import_module(spec.module)
    settings = next(
        kind for name, kind in vars(module).items() if name.endswith("Settings") and kind.__module__ == spec.module
    )
    stage = Stage(spec, settings.model_validate(spec.settings))
    if spec.module == "tasks.train":
        read_rows_of(stage)
    else:
        if spec.module in ASKING:
            vars(module)["engines"] = instant
        module.run(stage)
    commit_manifest(stage.store, stage.manifest)


def plan(place: str, root: str) -> None:
    """In a process of its own: what ``switchyard plan`` does."""
    from flows.plan import plan_run
    from tasks.config import load_config

    found = plan_run(load_config(Path(place)), root)
    assert not found.problems, found.problems


def alone(*arguments: str) -> dict[str, float]:
    """Peak memory, MiB, and seconds of this module with these arguments."""
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-m", "benchmarks.rows", *arguments], capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(ended.stderr)
    peak = float(ended.stdout.splitlines()[-1])
    return {"peak_mib": peak, "seconds": round(time.monotonic() - began, 1)}


class Enough(Exception):
    """The stages that grow with rows are done."""


def measured(folder: Path, rows: int, last: str | None) -> dict[str, dict[str, float]]:
    """By stage, up to the last one that is asked for."""
    from flows.cycle import identities
    from flows.distill import story
    from flows.story import Pipeline
    from tasks.config import load_config
    from tasks.stage import StageSpec

    found: dict[str, dict[str, float]] = {}

    class Measuring(Pipeline):
        def perform(self, spec: StageSpec) -> str:
            if spec.stage.startswith("evaluate"):
                raise Enough
            place = folder / "spec.json"
            place.write_text(spec.model_dump_json())
            found[spec.stage] = alone("--stage", str(place))
            print({rows: {spec.stage: found[spec.stage]}}, file=sys.stderr, flush=True)
            if spec.stage == last:
                raise Enough
            return spec.manifest_path

    write_prompts(folder / "prompts.jsonl", rows // SAMPLES)
    path = config(folder, rows // SAMPLES)
    root = str(folder / "root")
    found["plan"] = alone("--plan", str(path), "--root", root)
    settings = load_config(path)
    try:
        story(Measuring(settings, root, "rows", {}), {**identities(settings, {}), "promoted": None})
    except Enough:
        return found
    raise AssertionError("the story never came to the stage that ends it")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=COUNTS, help="sampled rows, five a prompt")
    parser.add_argument("--last", metavar="STAGE", help="end with this stage; default: the one before evaluation")
    parser.add_argument("--folder", type=Path, help="work below it; default: a temporary folder")
    parser.add_argument("--stage", help="only do the stage of this spec, and print the peak memory")
    parser.add_argument("--plan", help="only plan these settings, and print the peak memory")
    parser.add_argument("--root", help="the store of --plan")
    arguments = parser.parse_args()
    if arguments.stage or arguments.plan:
        peak = Peak()
        peak.start()
        perform(arguments.stage) if arguments.stage else plan(arguments.plan, arguments.root)
        peak.over.set()
        peak.join()
        print(round(peak.bytes / MIB, 1))
        return
    by_rows = {}
    for rows in arguments.rows:
        folder = Path(tempfile.mkdtemp(prefix="switchyard-rows-", dir=arguments.folder))
        try:
            by_rows[rows] = measured(folder, rows, arguments.last)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    peaks = {
        stage: {str(rows): by_rows[rows][stage]["peak_mib"] for rows in by_rows} for stage in by_rows[arguments.rows[0]]
    }
    seconds = {str(rows): round(sum(entry["seconds"] for entry in found.values())) for rows, found in by_rows.items()}
    result = {"conditions": conditions(), "samples_a_prompt": SAMPLES, "peak_mib_by_rows": peaks, "seconds": seconds}
    for stage, peak in peaks.items():
        print(f"{stage}: {', '.join(f'{int(rows):,} rows {mib:,.0f} MiB' for rows, mib in peak.items())}")
    publish(f"rows-{arguments.last}" if arguments.last else "rows", result, arguments)


if __name__ == "__main__":
    main()

"""Where the time of a whole run goes: engines, training, start-up, and the rest by what it is.

Every moment from the start of ``switchyard run`` to its end belongs to one part. What engines and training workers do
is noted in their own processes (``timed_site/sitecustomize.py``), the rest follows from specs and manifests:

- start-up, in kinds: Prefect's server and Ray's head, before the first stage; jobs, from submission to a stage's first
  line, and connecting to Ray; imports; engines, while they load; training workers, from a training stage's beginning to
  theirs;
- between stages: from a manifest to the next stage's submission; at the end until the command returns;
- store: waiting for parts, files and manifests to be committed;
- the rest of a stage, by its name where it has no engine and no training.
"""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from infra.manifest import Manifest

START_UP = "start-up"
KINDS = ("engines", "training workers", "imports", "Prefect and Ray", "jobs")
# Where several parts go on at once, the first of these is meant.
FIRST = ("engines", "training", *(f"{START_UP}: {kind}" for kind in KINDS), "store")
SITE = Path(__file__).parent / "timed_site"
# Parts that are not overhead.
WORK = ("engines", "training", START_UP)


class Span(NamedTuple):
    part: str
    start: float
    end: float


def traced_run(config: Path, root: Path, trace: Path, overrides: list[str]) -> list[Span]:
    """Run a distillation to its end; its spans."""
    trace.mkdir(parents=True, exist_ok=True)
    paths = os.pathsep.join([str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "TIMED_TRACE": str(trace), "SWITCHYARD_HOME": str(trace / "home")}
    settings = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "flows.cli", "run", str(config), "--root", str(root), *settings]
    began = time.time()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    (trace / "run.json").write_text(json.dumps([began, time.time()]))
    return spans(root, trace)


def spans(root: Path, trace: Path) -> list[Span]:
    """Of a traced run that went through at once."""
    found = [Span(*json.loads(line)) for file in trace.glob("*.jsonl") for line in file.read_text().splitlines()]
    training = [span.start for span in found if span.part == "training"]
    stages = []
    for path in root.glob("stages/*/*/manifest.json"):
        submitted = (path.parent / "spec.json").stat().st_mtime
        stages.append((submitted, Manifest.model_validate_json(path.read_text())))
    stages.sort(key=lambda stage: stage[0])
    began, ended = json.loads((trace / "run.json").read_text())
    found.append(Span(f"{START_UP}: Prefect and Ray", began, stages[0][0]))
    for number, (submitted, manifest) in enumerate(stages):
        assert manifest.finished
        start, end = manifest.started.timestamp(), manifest.finished.timestamp()
        found.append(Span(f"{START_UP}: jobs", submitted, start))
        if manifest.module == "tasks.train":
            found.append(Span(f"{START_UP}: training workers", start, min(at for at in training if at > start)))
        inside = any(span.part in ("engines", "training") and start < span.end < end for span in found)
        found.append(Span("stages around engines and training" if inside else manifest.stage, start, end))
        found.append(Span("between stages", end, stages[number + 1][0] if number + 1 < len(stages) else ended))
    return found


def parts(found: list[Span]) -> dict[str, float]:
    """Seconds of every part; together the run's."""
    edges = sorted({edge for span in found for edge in (span.start, span.end)})
    order = {part: place for place, part in enumerate(FIRST)}
    totals: dict[str, float] = defaultdict(float)
    for start, end in pairwise(edges):
        at_once = [span.part for span in found if span.start < end and span.end > start]
        if at_once:
            totals[min(at_once, key=lambda part: order.get(part, len(FIRST)))] += end - start
    return {part: round(seconds, 1) for part, seconds in sorted(totals.items(), key=lambda item: -item[1])}


def overhead_share(seconds: dict[str, float]) -> float:
    """The share of a run outside engines, training and start-up."""
    return 1 - sum(seconds.get(part, 0.0) for part in WORK) / sum(seconds.values())


def summary(found: list[Span]) -> dict[str, Any]:
    fine = parts(found)
    start_up = {part.partition(": ")[2]: took for part, took in fine.items() if part.startswith(START_UP)}
    seconds = {part: took for part, took in fine.items() if not part.startswith(START_UP)}
    seconds = {START_UP: round(sum(start_up.values()), 1), **seconds}
    return {
        "overhead_share": round(overhead_share(seconds), 4),
        "parts": seconds,
        "start_up": start_up,
        "seconds": round(sum(seconds.values()), 1),
    }

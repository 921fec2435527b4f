"""Signals on real text: `configs/gsm8k.yaml` and `configs/dolly.yaml` with all signals and with none, seed by seed.

    python -m benchmarks.real_text --data FOLDER [--hours H]     run cells whose results are not there yet
    python -m benchmarks.real_text --report [--json]             what the results say, with intervals

The folder holds the files that FILES names. Results lie in benchmarks/results/real_text, one file a cell, and
`python -m benchmarks.methods --page` shows them. Settings are those of the shipped files but for SIZES, which two cores
allow, for the student, which can write sentences before it learns anything, and for the method: fine-tuning on what the
teacher wrote, which signals choose, without rollouts, which take longer. Teacher and TA are SmolLM2-135M-Instruct, the
student is 24 of its 30 layers.

Compared are ROUGE-L and response loss against the source's own answers on held-out prompts, the same in all cells.
Intervals resample prompts and seeds, as in `benchmarks/gains.py`.
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from benchmarks.conditions import RESULTS, options
from benchmarks.gains import difference, interval
from benchmarks.grid import SEEDS

FOLDER = RESULTS / "real_text"
CONFIGS = Path(__file__).parent.parent / "configs"
FILES = {
    "gsm8k": ("gsm8k_train.jsonl", "gsm8k_test.jsonl"),
    "dolly": ("dolly_train.jsonl.gz", "dolly_dev.jsonl"),
}
SIGNALS = ("all", "none")
# Without the six layers whose output is most like their input (cosine, mean over positions of Dolly): response loss
# there 3.7, the whole model's 2.9.
LAYERS = [layer for layer in range(30) if not 12 <= layer <= 17]
# Of the first rows of a file all that are short enough: a drawn part would be another one with every seed.
FIRST, HELDOUT = 48, {"gsm8k": 48, "dolly": 47}
SIZES: dict[str, Any] = {
    "models.student.layers": LAYERS,
    "prompts.sources.0.limit": 1000,
    "prompts.heldout_sources.0.limit": FIRST,
    "prompts.near_duplicates.enabled": False,
    "budget.queries": 80,
    "sampling.teacher.max_tokens": 96,
    "sampling.student.max_tokens": 64,
    "signals.candidates": 160,
    "warmup.batch_size": 8,
    "warmup.steps": 8,
    "warmup.learning_rate": 1e-4,
    "train.method": {"type": "seqkd"},
    "train.batch_size": 8,
    "train.steps": 24,
    "train.learning_rate": 1e-4,
    "evaluate.max_tokens": 96,
    "promote.enabled": False,
}
METRICS = {"rouge_l": "evaluations", "loss": "losses"}


@dataclass(frozen=True)
class Cell:
    """One run."""

    data: str
    signals: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data}-{self.signals}-seed{self.seed}"


def grid() -> list[Cell]:
    """All cells: pairs of arms, seed by seed."""
    return [Cell(data, signals, seed) for seed in SEEDS for data in FILES for signals in SIGNALS]


def settings(cell: Cell, folder: Path) -> dict[str, Any]:
    """The run's settings."""
    from tasks.config import load_config

    learnt, heldout = (str(folder / name) for name in FILES[cell.data])
    paths = {"prompts.sources.0.path": learnt, "prompts.heldout_sources.0.path": heldout}
    own = {"name": cell.name, "seed": cell.seed, "signals.use": cell.signals, "prompts.heldout": HELDOUT[cell.data]}
    changes = [f"{path}={json.dumps(value)}" for path, value in {**SIZES, **paths, **own}.items()]
    return load_config(CONFIGS / f"{cell.data}.yaml", changes).model_dump(mode="json")


def run(cell: Cell, shared: dict[str, Any], folder: Path, root: str) -> dict[str, Any]:
    """A cell; its figures."""
    from benchmarks.cells import LABELS, complete
    from infra.parts import read_rows
    from infra.store import open_store

    result, manifests = complete(cell.name, settings(cell, folder), root, shared)
    store = open_store(root)

    def marks(metric: str, label: str) -> dict[str, float]:
        """By held-out prompt, the mean over its answers."""
        names = [manifests[name] for name in ("evaluate-before", "evaluate-after")]
        rows = pa.concat_tables(read_rows(store, name, METRICS[metric]) for name in names)
        table = rows.filter(pc.equal(rows["label"], label)).group_by("prompt_id").aggregate([(metric, "mean")])
        return {row["prompt_id"]: round(row[f"{metric}_mean"], 4) for row in table.to_pylist()}

    kept = read_rows(store, manifests["keep"], "scores", ["kept"])["kept"]
    return {
        **result,
        "arm": vars(cell),
        "kept": pc.sum(kept).as_py(),
        "annotated": len(kept),
        **{metric: {label: marks(metric, label) for label in LABELS} for metric in METRICS},
    }


def load(folder: Path = FOLDER) -> dict[Cell, dict[str, Any]]:
    """Results by cell."""
    found = (json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))
    return {Cell(**result["arm"]): result for result in found}


def summary(found: dict[Cell, dict[str, Any]]) -> list[dict[str, Any]]:
    """By data set and metric: what each arm reached, where its student began, and all signals minus none, with its
    interval, on the seeds that both arms have."""
    rows = []
    for data in FILES:
        seeds = [seed for seed in SEEDS if all(Cell(data, signals, seed) in found for signals in SIGNALS)]
        if not seeds:
            continue
        cells = {signals: [found[Cell(data, signals, seed)] for seed in seeds] for signals in SIGNALS}
        for metric in METRICS:
            arms = {name: scores(cells[name], metric) for name in SIGNALS}
            rows.append(
                {
                    "data": data,
                    "metric": metric,
                    "seeds": seeds,
                    **{label: float(scores(cells["none"], metric, label).mean()) for label in ("base", "teacher")},
                    **{name: float(arm_PS.mean()) for name, arm_PS in arms.items()},
                    "difference": float(arms["all"].mean() - arms["none"].mean()),
                    "interval": interval([{data: arms[name]} for name in SIGNALS], difference),
                    "teacher_tokens": {name: mean(cell["teacher_tokens"] for cell in cells[name]) for name in SIGNALS},
                }
            )
    return rows


def scores(cells: list[dict[str, Any]], metric: str, label: str = "final") -> NDArray:
    """Each held-out prompt's figure in each cell [P, S]."""
    return np.array([[cell[metric][label][prompt] for cell in cells] for prompt in sorted(cells[0][metric][label])])


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--data", type=Path, help="where the files lie")
    parser.add_argument("--hours", type=float, default=24.0, help="start no cell after this")
    parser.add_argument("--cells", type=int, help="run at most so many")
    parser.add_argument("--root", default="runs/real-text", help="where the runs lie")
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    if arguments.report:
        rows = summary(load(arguments.results))
        for row in rows:
            print(row)
        if arguments.json:
            print(json.dumps(rows))
        return
    if arguments.data is None:
        parser.error("--data: say in which folder the files lie")
    from benchmarks.cells import run_all, todo

    left = todo(grid(), arguments.results)[: arguments.cells]
    perform = partial(run, folder=arguments.data.resolve(), root=arguments.root)
    done = run_all(left, perform, arguments.root, arguments.results, 3600 * arguments.hours)
    print(f"{done} cells run", file=sys.stderr)


if __name__ == "__main__":
    main()

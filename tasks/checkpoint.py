"""A resumable checkpoint: safetensors, Parquet and JSON in one folder, no pickle.

    state.json               counters, the data cursor, the best validation, seconds, positions
    steps.parquet            the training curve so far (STEP)
    weights.safetensors      what learns, whole tensors in float32, however many workers hold them
    optimizer.safetensors    AdamW's two moments of each
    best.safetensors         the weights of the best validation, if they are kept
    pool.parquet             rollouts that are trained on again, of methods that keep them
    student/                 the finished student, only in a stage's last checkpoint

Everything else is a function of the seed and the counters: the order of the data, the noise of rollouts, and dropout.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tasks.batches import Sequence
from tasks.pool import load_pool, save_pool
from tasks.schemas import STEP
from tasks.student import Student, fill, full

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Best:
    """The best validation so far. ``weights`` are on the first worker only."""

    step: int
    loss: float
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class State:
    """Where training stands; the same on every worker."""

    step: int = 0
    rows_drawn: int = 0
    prompts_drawn: int = 0
    teacher_tokens: int = 0  # response positions the teacher decided in rollouts
    capped: int = 0  # sequences that were annotated rows because the cap on teacher tokens was reached
    start_loss: float | None = None  # validation before the first step
    phi_steps: int = 0  # how often DistiLLM's φ has grown
    phi_loss: float | None = None  # validation cross entropy when it last did; at first, before training
    best: Best | None = None
    finished: bool = False
    peak_bytes: int = 0
    parity: dict[str, dict[str, float]] = field(default_factory=dict)  # by role: engine against training model
    data: dict[str, int] = field(default_factory=dict)  # rows and prompts, used and left out
    seconds: dict[str, float] = field(default_factory=dict)
    positions: list[list[int]] = field(default_factory=list)  # the columns of table `positions`
    steps: list[dict[str, float | None]] = field(default_factory=list)
    pool: list[Sequence] = field(default_factory=list)  # rollouts that are trained on again; the oldest first

    def spend(self, what: str, seconds: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds


def save_state(folder: Path, state: State) -> None:
    """Counters, curve and pool."""
    values = vars(state) | {"best": state.best and {"step": state.best.step, "loss": state.best.loss}}
    curve = pa.Table.from_pylist(values.pop("steps"), STEP)
    if pool := values.pop("pool"):
        save_pool(folder / "pool.parquet", pool)
    (folder / "state.json").write_text(json.dumps(values))
    pq.write_table(curve, folder / "steps.parquet")


def load_state(folder: Path) -> State:
    values = json.loads((folder / "state.json").read_text())
    values["best"] = Best(**values["best"]) if values["best"] else None
    pool = load_pool(folder / "pool.parquet") if (folder / "pool.parquet").exists() else []
    return State(**values, steps=pq.read_table(folder / "steps.parquet").to_pylist(), pool=pool)


def save(folder: Path, state: State, student: Student, optimizer: torch.optim.Optimizer) -> None:
    """Everything that a later ``load`` needs. Collective; only the first worker writes."""
    writes = student.world.rank == 0
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, parameter in student.trained().items():
        weight, parts = full(parameter), {key: full(optimizer.state[parameter][key]) for key in MOMENTS}
        if writes:
            weights[name] = weight
            moments |= {f"{key}.{name}": part for key, part in parts.items()}
    if writes:
        save_state(folder, state)
        save_file(weights, folder / "weights.safetensors")
        save_file(moments, folder / "optimizer.safetensors")
        if state.best and state.best.weights:
            save_file(state.best.weights, folder / "best.safetensors")


def load(folder: Path, student: Student, optimizer: torch.optim.Optimizer) -> State:
    """Put a saved state into a fresh student and optimiser."""
    state = load_state(folder)
    weights, moments = load_file(folder / "weights.safetensors"), load_file(folder / "optimizer.safetensors")
    for name, parameter in student.trained().items():
        fill(parameter, weights[name])
        held = {key: torch.zeros_like(parameter) for key in MOMENTS}
        for key, moment in held.items():
            fill(moment, moments[f"{key}.{name}"])
        optimizer.state[parameter] = {"step": torch.tensor(float(state.step)), **held}
    if state.best and student.world.rank == 0 and (folder / "best.safetensors").exists():
        state.best.weights = load_file(folder / "best.safetensors")
    return state

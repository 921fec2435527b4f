"""Training, both stages: a student, kept rows and charged prompts in; a better student out.

    python -m tasks.train --spec SPEC.json

Ray Train runs ``tasks/loop.py`` on every worker; this process starts it, shows its progress and commits what it made.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from infra.models import ModelRef
from infra.store import Store
from tasks.config.base import Config
from tasks.config.train import Sft, TrainConfig
from tasks.schemas import POSITION, STEP
from tasks.stage import Runtime, Stage, main

# A first worker on a busy machine, or on a node that is still being added, takes minutes to import torch.
START_TIMEOUT_S = 900
# Ray Train looks at its workers this often; a worker that reports waits for it.
POLL_S = 0.5


class TrainSettings(Config):
    """One training stage."""

    train: TrainConfig
    """What is minimised, and how."""
    seed: int
    """Seed of data order, rollouts and dropout."""
    student: str = "student"
    """Key of the student in the models of ``student_input``."""
    student_input: str = "models"
    """Input whose manifest names the student: ``models``, or an earlier training stage."""
    teacher: str = "teacher"
    """Key of the teacher in input ``models``; not read by methods that train on text alone."""
    rows: list[str]
    """Inputs with tables ``kept`` and ``charged``."""
    stage_name: Literal["warmup", "train"]
    """Which stage this is: it names the noise of its rollouts."""
    online_teacher_tokens: int | None = None
    """Cap on response positions the teacher decides in rollouts; none where absent."""


def model_of(stage: Stage[TrainSettings], source: str, key: str) -> ModelRef:
    """The model that an input's manifest names."""
    models = stage.input(source).facts["models"]
    if key not in models:
        raise ValueError(f"input {source!r} names no model {key!r}; it has {', '.join(models)}")
    return ModelRef.model_validate(models[key])


def plan_of(stage: Stage[TrainSettings]) -> dict[str, Any]:
    """``tasks.loop.Plan`` for the workers, checked. ValueError where teacher and student do not fit together."""
    settings, runtime = stage.settings, stage.spec.runtime
    student, teacher = model_of(stage, settings.student_input, settings.student), None
    if settings.train.precision == "bfloat16" and not runtime.gpus_per_worker:
        raise ValueError("train.precision: bfloat16 needs GPUs; use auto, or set resources.gpus_per_worker")
    if not isinstance(settings.train.method, Sft):
        teacher = model_of(stage, "models", settings.teacher)
        if teacher.tokenizer_hash != student.tokenizer_hash or teacher.eos_token_ids != student.eos_token_ids:
            raise ValueError(
                f"train.method {settings.train.method.type} compares distributions, but teacher {teacher.name} and student "
                f"{student.name} differ in tokenizer or end-of-sequence tokens; use a student of the teacher's family, or sft"
            )
    device = "cuda" if runtime.gpus_per_worker else "cpu"
    return {
        "root": stage.store.uri,
        "rows": [stage.input(name).path for name in settings.rows],
        "student": student.model_dump(),
        "teacher": teacher and teacher.model_dump(),
        "train": settings.train.model_dump(),
        "seed": settings.seed,
        "stage_name": settings.stage_name,
        "online_teacher_tokens": settings.online_teacher_tokens,
        "threads": runtime.threads,
        "device": device,
        "sharded": device == "cuda",
    }


def storage(store: Store, path: str) -> tuple[pa.fs.FileSystem, str]:
    """A place of the store as Arrow's file systems name it, for Ray Train's checkpoints."""
    place = urlparse(store.location(path))
    if place.scheme != "s3":
        return pa.fs.LocalFileSystem(), place.path
    endpoint = urlparse(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "https:")
    system = pa.fs.S3FileSystem(endpoint_override=endpoint.netloc or None, scheme=endpoint.scheme)
    return system, place.netloc + place.path


@contextmanager
def connected(runtime: Runtime) -> Iterator[None]:
    """Ray: the one already in use, the cluster of a job (``RAY_ADDRESS``), or one of this process's own."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto")
    else:
        cpus = max(os.cpu_count() or 1, runtime.workers)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False)
    try:
        yield
    finally:
        ray.shutdown()


class Relay:
    """An actor between the first worker and this process: rows of the curve."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def put(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def take(self) -> list[dict[str, Any]]:
        rows, self.rows = self.rows, []
        return rows


@contextmanager
def shown(stage: Stage[TrainSettings], relay: Any) -> Iterator[None]:
    """Steps as progress while the block runs."""
    import ray

    steps, ended = stage.settings.train.steps, threading.Event()

    def show() -> None:
        for row in ray.get(relay.take.remote())[-1:]:
            facts = {name: row[name] for name in ("loss", "validation_loss", "intervention_rate")}
            speed = row["tokens"] / row["seconds"]
            stage.progress(row["step"], steps, "steps", tokens_per_second=round(speed, 1), **facts)

    def watch() -> None:
        while not ended.wait(POLL_S):
            show()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    show()


def fit(stage: Stage[TrainSettings], plan: dict[str, Any]) -> Any:
    """Run the loop on all workers, from the last checkpoint if there is one; its last checkpoint."""
    # Ray Train reads these where it starts.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_TIMEOUT_S))
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_S))
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer

    from tasks.loop import train

    runtime, gpu = stage.spec.runtime, stage.spec.runtime.gpus_per_worker > 0
    system, place = storage(stage.store, stage.spec.folder)
    relay = ray.remote(num_cpus=0)(Relay).remote()
    trainer = TorchTrainer(
        train,
        train_loop_config={"plan": plan, "relay": relay},
        # Counts are summed on the CPU, gradients where they are.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=runtime.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": 1, "GPU": runtime.gpus_per_worker} if gpu else {"CPU": 1},
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=place,
            storage_filesystem=system,
            checkpoint_config=CheckpointConfig(num_to_keep=stage.settings.train.keep_checkpoints),
            # What fails is begun again by who runs the stage, from the last checkpoint.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=3),
            worker_runtime_env={"env_vars": {"TOKENIZERS_PARALLELISM": "false"}},
        ),
    )
    with shown(stage, relay):
        try:
            return trainer.fit().checkpoint
        except WorkerGroupError as error:
            for failure in error.worker_failures.values():
                cause = getattr(failure, "_base_exc", failure)
                if isinstance(cause, ValueError):
                    raise cause from error
            raise


def summary(state: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The stage's facts from its last state and its curve."""
    rolled = [row for row in steps if row["response_length"]]
    rollouts = [row["teacher_tokens"] / row["response_length"] for row in rolled]
    emitted, interventions, agreeing, cuts = map(sum, state["positions"])
    tokens, best = sum(row["tokens"] for row in steps), state["best"] or {}
    return {
        "steps": state["step"],
        "tokens": tokens,
        "tokens_per_second": tokens / sum(row["seconds"] for row in steps),
        "rollouts": round(sum(rollouts)),
        "online_teacher_tokens": state["teacher_tokens"],
        "budget_exhausted": state["capped"],
        "intervention_rate": interventions / emitted if emitted else None,
        "agreeing_interventions": agreeing / interventions if interventions else None,
        "cut_rate": cuts / emitted if emitted else None,
        "eos_rate": sum(row["eos_rate"] * n for row, n in zip(rolled, rollouts, strict=True)) / sum(rollouts)
        if rolled
        else None,
        "response_length": emitted / sum(rollouts) if rolled else None,
        # Steps whose rollouts all ran into the length limit: a long row of them is a collapse.
        "steps_without_eos": sum(row["eos_rate"] == 0 for row in rolled),
        "start_validation_loss": state["start_loss"],
        "best_validation_loss": best.get("loss"),
        "best_step": best.get("step"),
        "data": state["data"],
        "seconds": state["seconds"],
        "peak_memory_bytes": state["peak_bytes"],
    }


CARD = """---
library_name: transformers
tags: [distillation]
---
# {name}, stage {stage_name}

A student distilled with Switchyard: {parameters:,} parameters, trained from revision `{origin}`.

- Method: `{method}`
- Data: {data}
- Training: {steps} steps, {tokens:,} response tokens, seed {seed}
- Validation loss (nats per response token): {start} before, {best} best
"""


def card(stage: Stage[TrainSettings], student: ModelRef, facts: dict[str, Any]) -> str:
    settings = stage.settings
    return CARD.format(
        name=student.name,
        stage_name=settings.stage_name,
        parameters=student.parameters,
        origin=student.revision,
        method=settings.train.method.model_dump_json(),
        data=", ".join(f"{count} {name.replace('_', ' ')}" for name, count in facts["data"].items()),
        steps=facts["steps"],
        tokens=facts["tokens"],
        seed=settings.seed,
        start=facts["start_validation_loss"],
        best=facts["best_validation_loss"],
    )


def commit(stage: Stage[TrainSettings], folder: Path, student: ModelRef) -> None:
    """Commit what the last checkpoint holds."""
    state, curve = json.loads((folder / "state.json").read_text()), pq.read_table(folder / "steps.parquet")
    stage.facts |= summary(state, curve.to_pylist())
    stage.write_table("steps", curve.cast(STEP))
    counts = [range(len(state["positions"][0])), *state["positions"]]
    stage.write_table("positions", pa.table([pa.array(count) for count in counts], names=POSITION.names).cast(POSITION))
    (folder / "student" / "README.md").write_text(card(stage, student, stage.facts))
    path = stage.add_files("student", folder / "student")
    weights = [file for file in stage.manifest.files["student"] if file.path.endswith(".safetensors")]
    revision = hashlib.sha256("".join(file.sha256 for file in weights).encode()).hexdigest()[:16]
    place = {"path": path, "id": None, "hub_revision": None, "bytes": sum(file.bytes for file in weights)}
    stage.facts["models"] = {"student": student.model_copy(update={"revision": revision, **place}).model_dump()}


def run(stage: Stage[TrainSettings]) -> None:
    """Train, then commit tables ``steps`` and ``positions``, files ``student``, facts and the student's reference."""
    plan = plan_of(stage)
    with connected(stage.spec.runtime):
        checkpoint = fit(stage, plan)
    with checkpoint.as_directory() as folder:
        commit(stage, Path(folder), ModelRef.model_validate(plan["student"]))
    system, place = storage(stage.store, f"{stage.spec.folder}/checkpoints")
    system.delete_dir(place)


if __name__ == "__main__":
    main(TrainSettings, run)

"""Training workers: Ray Train started on the run's cluster, its progress relayed, its last checkpoint handed back."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from infra.faults import fault_of
from tasks.plan import Plan
from tasks.resume import storage, tidy
from tasks.stage import Stage

# How long workers wait for their places: nodes that are still being added take minutes. Where fewer workers will do,
# places are counted first, and one that is not there belongs to a node that was just lost: it is counted again.
START_TIMEOUT_S, FEWER_START_TIMEOUT_S = 900, 60
# Ray Train looks at its workers this often; a worker that reports waits for it.
POLL_S = 0.5


# Of a step, what is shown live.
SHOWN = (
    *("loss", "loss_on_policy", "loss_off_policy", "validation_loss"),
    *("intervention_rate", "response_length", "eos_rate"),
)


class Relay:
    """An actor between the workers and this process: rows of the curve from the first, warnings from all."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.warnings: dict[str, bool] = {}  # whether it was taken; what several workers say is told once

    def put(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def warn(self, text: str) -> None:
        self.warnings.setdefault(text, False)

    def take(self) -> tuple[list[dict[str, Any]], list[str]]:
        rows, self.rows = self.rows, []
        fresh = [text for text, taken in self.warnings.items() if not taken]
        self.warnings.update(dict.fromkeys(fresh, True))
        return rows, fresh


class Warner(logging.Handler):
    """A worker's warnings, for the stage's log: what workers print stays in Ray's files."""

    def __init__(self, relay: Any) -> None:
        super().__init__(logging.WARNING)
        self.relay = relay

    def emit(self, record: logging.LogRecord) -> None:
        self.relay.warn.remote(record.getMessage())


@contextmanager
def shown(stage: Stage[Any], relay: Any, steps: int) -> Iterator[None]:
    """Steps as progress while the block runs."""
    import ray

    ended = threading.Event()

    def show() -> None:
        rows, warnings = ray.get(relay.take.remote())
        for text in warnings:
            stage.log.warning("%s", text)
        for row in rows[-1:]:
            facts = {name: row[name] for name in SHOWN}
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


def work(config: dict[str, Any]) -> None:
    """A worker's life. Its imports take seconds, and only the workers need them."""
    from tasks.loop import train

    logging.getLogger("tasks").addHandler(Warner(config["relay"]))
    train(config)


def fit(stage: Stage[Any], plan: Plan) -> None:
    """Run the loop on all workers, from the last whole checkpoint if there is one, to its last checkpoint.

    ValueError for what no other attempt mends, MemoryError where a worker ran out of memory, and faults of the store.
    """
    runtime, gpu = stage.spec.runtime, plan.device == "cuda"
    fewer = bool(runtime.min_workers and runtime.min_workers < runtime.workers)
    # Ray Train reads these where it starts.
    patience = FEWER_START_TIMEOUT_S if fewer else START_TIMEOUT_S
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(patience))
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_S))
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    if plan.device == "cpu":
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from infra.engine_room import here

    # Type checkers see the first version of Ray Train's settings, Ray runs the second.
    api: Any = ray.train
    system, place = storage(stage.store, stage.spec.folder)
    tidy(system, f"{place}/checkpoints", plan.train.keep_checkpoints)
    # Beside this process: it tells of training, which must not end with a node that does none of it.
    relay = ray.remote(num_cpus=0, scheduling_strategy=here())(Relay).remote()
    workers: int | tuple[int, int] = (runtime.min_workers or 1, runtime.workers) if fewer else runtime.workers
    trainer = TorchTrainer(
        work,
        train_loop_config={
            "plan": plan.model_dump(mode="json"),
            "relay": relay,
            "checkpoints": f"{stage.spec.folder}/checkpoints",
        },
        # Counts are summed on the CPU, gradients where they are.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo"),
        scaling_config=api.ScalingConfig(
            num_workers=workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": 1, "GPU": runtime.gpus_per_worker} if gpu else {"CPU": 1},
        ),
        run_config=api.RunConfig(
            name="checkpoints",
            storage_path=place,
            storage_filesystem=system,
            checkpoint_config=api.CheckpointConfig(num_to_keep=plan.train.keep_checkpoints),
            # What fails is begun again by who runs the stage, from the last checkpoint.
            failure_config=api.FailureConfig(max_failures=0, controller_failure_limit=3),
            logging_config=api.LoggingConfig("ERROR"),
            worker_runtime_env={"env_vars": {"TOKENIZERS_PARALLELISM": "false"}},
        ),
    )
    with shown(stage, relay, plan.train.steps):
        try:
            trainer.fit()
        except api.WorkerGroupError as error:
            for failure in error.worker_failures.values():
                cause = getattr(failure, "_base_exc", failure)
                if isinstance(cause, ValueError | MemoryError) or fault_of(cause):
                    raise cause from error
                if isinstance(cause, ray.exceptions.OutOfMemoryError):
                    # Ray ends workers before the machine's memory is full.
                    raise MemoryError("a worker was ended because the machine's memory was nearly full") from error
            raise

"""What ``switchyard plan --deep`` looks at: do engines and training models agree, before anything is spent on them?

A few answers of teacher and student through the engines, then the same tokens read by the models that will train. The
stages are those of the run, so what it prepares here is reused there.
"""

from typing import Any

from prefect import flow
from prefect.states import Cancelled, Failed

from flows.distill import identities, prepare
from flows.local import on_running_cluster
from flows.runner import Runner, StageCancelled, StageFailed
from flows.story import on_gpu
from infra.manifest import load_manifest
from tasks.config import RunConfig


@flow(name="deep-check", flow_run_name="{config.name}", log_prints=False)
def deep_check(config: RunConfig, root: str) -> Any:
    """The largest and mean difference of log-probabilities for teacher and student, by role."""
    try:
        with Runner.open(on_running_cluster(config), root, suffix="-deep") as runner:
            return look(runner, config)
    except StageCancelled as cancelled:
        return Cancelled(message=str(cancelled))
    except StageFailed as failed:
        return Failed(message=str(failed))


def look(runner: Runner, config: RunConfig) -> dict[str, Any]:
    plain, sequences = config.model_dump(mode="json"), config.train.parity.sequences
    models, prompts = prepare(runner, identities(config))
    samples = {
        role: runner.stage(
            f"deep-{role}",
            "tasks.sample",
            {
                "role": role,
                "engine": role,
                "table": "warmup",
                "limit": sequences,
                "sampling": plain["sampling"][role] | {"samples": 1},
                "logprobs": True,
                "seed": config.seed,
                "shard_size": config.sampling.shard_size,
                "template_args": config.models.chat_template_args,
            },
            models=models,
            prompts=prompts,
        )
        for role in ("teacher", "student")
    }
    place = runner.stage(
        "deep-parity",
        "tasks.parity",
        {"parity": plain["train"]["parity"], "gpu": on_gpu(config)},
        models=models,
        teacher_samples=samples["teacher"],
        student_samples=samples["student"],
    )
    return load_manifest(runner.store, place).facts

"""What ``switchyard plan --deep`` looks at: do engines and training models agree, before anything is spent on them?

A few answers of teacher and student through the engines, then the same tokens read by the models that will train. The
stages are those of the run, so what it prepares here is reused there.
"""

from typing import Any

from prefect import flow

from flows.cycle import Start, look
from flows.distill import prepare
from flows.ends import end_of
from flows.local import on_running_cluster
from flows.runner import Runner
from flows.story import on_gpu
from infra.manifest import load_manifest
from infra.store import open_store
from tasks.config import RunConfig
from tasks.config.trackers import Trackers


@flow(name="deep-check", flow_run_name="{config.name}", log_prints=False)
def deep_check(config: RunConfig, root: str) -> Any:
    """The largest and mean difference of log-probabilities for teacher and student, by role."""
    try:
        # A check is no run that anybody follows.
        start = look(on_running_cluster(config.model_copy(update={"trackers": Trackers()})), open_store(root))
        with Runner.open(start.config, root, run=f"{start.run}-deep") as runner:
            return compare(runner, start)
    except Exception as error:
        return end_of(error)


def compare(runner: Runner, start: Start) -> dict[str, Any]:
    config = start.config
    plain, sequences = config.model_dump(mode="json"), config.train.parity.sequences
    models, prompts = prepare(runner, start.found)
    samples = {
        role: runner.stage(
            f"deep-{role}",
            "tasks.sample",
            {
                "role": role,
                "engine": role,
                "table": "candidates",
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
    facts = load_manifest(runner.store, place).facts
    return {role: facts[role] for role in samples if role in facts}

"""An evaluation alone: any model on any problems. Its stages are those of a distillation.

Deployed as ``evaluate``; its settings are ``tasks/config/evaluation.py``.
"""

from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact

from flows.artifacts import metric_rows
from flows.cycle import identities
from flows.distill import prepare
from flows.ends import end_of
from flows.local import on_running_cluster
from flows.prelude import measured
from flows.runner import Runner, run_name
from flows.story import Pipeline
from infra.manifest import load_manifest
from tasks.config.evaluation import Evaluation

# Stages speak of a distillation's settings.
CALLED = {"prompts.heldout_sources": "problems", "prompts.heldout": "count", "models.teacher": "model"}


def story(pipeline: Pipeline, found: dict[str, Any]) -> str:
    """Model and problems, answers, metrics; returns the manifest of the last."""
    config, stage = pipeline.config, pipeline.stage
    measure = {"evaluate": config.evaluate.model_dump(mode="json"), "seed": config.seed}
    models, prompts = prepare(pipeline, found)
    answers = stage(
        "evaluate",
        "tasks.evaluate",
        {
            **measure,
            "entries": [{"label": "final", "engine": "student"}],
            "shard_size": config.sampling.shard_size,
            "template_args": config.models.chat_template_args,
        },
        models=models,
        prompts=prompts,
    )
    return stage("measure", "tasks.measure", measure, evaluate=answers)


@flow(name="evaluate", flow_run_name=run_name, log_prints=False, validate_parameters=False)
def evaluate(config: Evaluation, root: str = "runs/default") -> Any:
    """Measure one model on problems: accuracy, and response loss and ROUGE-L where references are known."""
    try:
        settings = on_running_cluster(measured(config, root).settings())
        with Runner.open(settings, root) as runner:
            manifest = load_manifest(runner.store, story(runner, identities(settings, {})))
        row = {**metric_rows(manifest.facts["metrics"])[0], "model": settings.name}
        create_table_artifact([row], key="metrics", description=f"{manifest.facts['heldout']} problems, with intervals")
        return row
    except Exception as error:
        state = end_of(error)
        message = state.message or ""
        for theirs, ours in CALLED.items():
            message = message.replace(theirs, ours)
        return state.model_copy(update={"message": message})

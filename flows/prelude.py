"""What a flow does first: its plan as a task. What stands in the way is an artifact and the run's cause of failure, one
line a problem, before anything expensive starts."""

from typing import Any

from prefect import State, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.settings import PREFECT_API_URL
from prefect.states import Failed
from pydantic import ValidationError

from flows.artifacts import duration, shown
from flows.doctor import open_prefect
from flows.ends import StageRefused
from flows.local import on_running_cluster
from flows.plan import Plan, plan_run
from flows.preflight import measurable
from flows.watch import check_cancelled
from tasks.config import RunConfig
from tasks.config.evaluation import Evaluation
from tasks.config.preset import Preset, kind
from tasks.config.problems import problems_of


def planned(config: Any, root: str, redo_from: str | None = None) -> RunConfig:
    """The settings in full, on the cluster that is up. StageRefused with the problems in one line."""
    return settled(look_at_run(config, root, redo_from, return_state=True))


def measured(config: Any, root: str) -> Evaluation:
    """The same of an evaluation."""
    return settled(look_at_evaluation(config, root, return_state=True))


def settled(state: State[Any]) -> Any:
    check_cancelled()
    if not state.is_completed():
        raise StageRefused(state.message)
    return state.result()


@task(name="plan", task_run_name="plan", cache_policy=NO_CACHE, persist_result=False)
def look_at_run(config: Any, root: str, redo_from: str | None) -> Any:
    if lack := open_prefect(PREFECT_API_URL.value()):
        return refused(lack)
    try:
        preset = Preset.model_validate(config) if kind(config) == "preset" else None
        settings = preset.settings() if preset else RunConfig.model_validate(config)
    except ValidationError as error:
        return refused(problems_of(error))
    except ValueError as error:
        return refused([str(error)])
    settings = on_running_cluster(settings)
    plan = plan_run(settings, root)
    if redo_from and plan.names and redo_from not in plan.names:
        plan.problems.append(f"redo_from: {redo_from!r} is no stage; stages are {', '.join(plan.names)}")
    show(plan)
    return refused(plan.problems) if plan.problems else settings


@task(name="plan", task_run_name="plan", cache_policy=NO_CACHE, persist_result=False)
def look_at_evaluation(config: Any, root: str) -> Any:
    if lack := open_prefect(PREFECT_API_URL.value()):
        return refused(lack)
    try:
        chosen = Evaluation.model_validate(config)
    except ValidationError as error:
        return refused(problems_of(error))
    problems = measurable(chosen, root)
    return refused(problems) if problems else chosen


def refused(problems: list[str]) -> State[Any]:
    lines = "\n".join(f"- {shown(problem)}" for problem in problems)
    create_markdown_artifact(f"# What stands in the way\n\n{lines}\n", key="problems", description="To be mended first")
    return Failed(message="; ".join(problems))


def show(plan: Plan) -> None:
    rows = [
        {
            "stage": stage.name,
            "state": "done" if stage.done else "to do",
            "rows": stage.rows,
            "tokens": stage.tokens,
            "estimate": "" if stage.done or stage.seconds is None else duration(stage.seconds),
        }
        for stage in plan.stages
    ]
    if rows:
        create_table_artifact(rows, key="plan", description=plan.summary)

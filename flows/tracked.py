"""A run in MLflow, Weights & Biases and TensorBoard. Each keeps figures as ``stage/figure`` by step."""

import json
import math
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows.local import home
from flows.trackers import Row

# What MLflow takes in one request.
MLFLOW_METRICS, MLFLOW_PARAMS, MLFLOW_PARAM_LENGTH = 1000, 100, 6000
MLFLOW_STATES = {"Completed": "FINISHED", "Failed": "FAILED", "Cancelled": "KILLED"}


def flat(settings: Any, prefix: str = "") -> dict[str, str]:
    """Settings as one text by dotted name; lists stay whole."""
    if not isinstance(settings, dict):
        return {prefix: settings if isinstance(settings, str) else json.dumps(settings)}
    found: dict[str, str] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}.{name}" if prefix else name)
    return found


class MlflowRun:
    """A run in the experiment that is called as the pipeline."""

    def __init__(self, address: str, experiment: str, run: str, settings: dict[str, Any]) -> None:
        # A server that is down is told in seconds, not in minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self.metric = Metric
        self.client = MlflowClient(tracking_uri=address)
        known = self.client.get_experiment_by_name(experiment)
        place = known.experiment_id if known else self.client.create_experiment(experiment)
        self.id = self.client.create_run(place, run_name=run, tags={"switchyard.run": run}).info.run_id
        params = [Param(name, text[:MLFLOW_PARAM_LENGTH]) for name, text in flat(settings).items()]
        for start in range(0, len(params), MLFLOW_PARAMS):
            self.client.log_batch(self.id, params=params[start : start + MLFLOW_PARAMS])

    def started(self, stage: str) -> None:
        self.client.set_tag(self.id, "switchyard.stage", stage)

    def rows(self, stage: str, rows: list[Row]) -> None:
        now = int(1000 * time.time())
        metrics = [
            self.metric(f"{stage}/{name}", value, now, step)
            for step, values in rows
            for name, value in values.items()
            if math.isfinite(value)
        ]
        for start in range(0, len(metrics), MLFLOW_METRICS):
            self.client.log_batch(self.id, metrics=metrics[start : start + MLFLOW_METRICS])

    def said(self, name: str, text: str) -> None:
        self.client.set_tag(self.id, f"switchyard.{name}", text)

    def close(self, state: str) -> None:
        self.client.set_terminated(self.id, MLFLOW_STATES[state])


class WandbRun:
    """A run in a project. Without a key it is written down below the root."""

    def __init__(self, project: str, run: str, settings: dict[str, Any], root: str) -> None:
        import wandb

        entity, _, project = project.rpartition("/")
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
        place = os.environ.get("WANDB_DIR") or (str(home()) if "://" in root else root)
        # Only what this module hands on: no terminal, code, repository, machine or command line.
        quiet = wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, x_disable_meta=True, x_disable_stats=True
        )
        self.known: set[str] = set()
        self.run = wandb.init(
            project=project, entity=entity or None, name=run, config=settings, dir=place, mode=mode, settings=quiet
        )

    def started(self, stage: str) -> None:
        self.run.summary["stage"] = stage

    def rows(self, stage: str, rows: list[Row]) -> None:
        if stage not in self.known:
            # Each stage counts its own steps, and a curve is completed when its stage ends.
            self.known.add(stage)
            self.run.define_metric(f"{stage}/step", hidden=True)
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        for step, values in rows:
            self.run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in values.items()}})

    def said(self, name: str, text: str) -> None:
        self.run.summary[name] = text

    def close(self, state: str) -> None:
        self.run.finish(exit_code=0 if state == "Completed" else 1)


class TensorBoardRun:
    """A folder of event files, named by run and time."""

    def __init__(self, folder: str, run: str, settings: dict[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(Path(folder) / f"{run}-{datetime.now(UTC):%Y%m%d-%H%M%S}"))
        self.said("settings", f"```json\n{json.dumps(settings, indent=1)}\n```")

    def started(self, stage: str) -> None: ...

    def rows(self, stage: str, rows: list[Row]) -> None:
        for step, values in rows:
            for name, value in values.items():
                self.writer.add_scalar(f"{stage}/{name}", value, step)

    def said(self, name: str, text: str) -> None:
        self.writer.add_text(name, text)

    def close(self, state: str) -> None:
        self.said("state", state)
        self.writer.close()

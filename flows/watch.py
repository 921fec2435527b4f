"""What is seen of a stage while it runs: its lines, and whether somebody cancels it."""

import json
import logging
from typing import Any

import httpx
from prefect.client.orchestration import get_client
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows.artifacts import StageProgress
from flows.display import display
from flows.ends import StageCancelled
from flows.trackers import Following
from tasks.stage import MARK

LEVELS = {"DEBUG": logging.DEBUG, "INFO": logging.INFO, "WARNING": logging.WARNING, "ERROR": logging.ERROR}


def told(line: str) -> dict[str, Any] | None:
    """What a stage says in a marked line; None where the line is cut off, and a line like any other."""
    try:
        event = json.loads(line[len(MARK) :])
    except ValueError:
        return None
    return event if isinstance(event, dict) and "kind" in event else None


class StageWatch:
    """What a running stage says: progress to display, artifact and trackers, its error, its log to Prefect."""

    def __init__(self, stage: str, following: Following) -> None:
        self.stage, self.following = stage, following
        self.error = ""
        self.damage = ""
        self.fault = ""
        self.lasting = False
        self.last_line = ""
        self.log = get_run_logger()
        self.artifact = StageProgress(stage)

    def take(self, lines: Any) -> None:
        for line in lines:
            if line.startswith(MARK) and (event := told(line)):
                if event["kind"] == "error":
                    self.error = event["message"]
                elif event["kind"] == "damaged":
                    self.damage = event["message"]
                elif event["kind"] == "fault":
                    self.fault, self.lasting = event["message"], event["lasting"]
                else:
                    display().progress(self.stage, event)
                    self.artifact.update(event)
                    self.following.progress(self.stage, event)
            elif line.strip():
                self.last_line = line.strip()[:300]
                level, _, rest = line.partition(" ")
                self.log.log(LEVELS.get(level, logging.DEBUG), "%s", rest if level in LEVELS else line)

    def close(self) -> None:
        self.artifact.close()


def check_cancelled() -> None:
    """A cancel from the UI does not reach a flow that was started from a shell: it has to look."""
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(flow_run.id).state
    except httpx.TransportError:
        # A server that is being restarted is asked again later.
        return
    if state is not None and (state.is_cancelling() or state.is_cancelled()):
        raise StageCancelled("cancelled from Prefect")

"""What is seen of a stage while it runs: its lines, and whether somebody cancels it."""

import json
import logging
from collections import Counter
from typing import Any

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import Pause
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows.display import display
from flows.ends import StageCancelled
from flows.progress import StageProgress
from flows.trackers import Following
from tasks.stage import MARK

LEVELS = {name: getattr(logging, name) for name in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")}
TRACE = "Traceback (most recent call last):"
# So many lines of each level of a stage go to Prefect; all of them stay in the log of its Ray job.
MOST_LINES = 1000


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
        self._in_trace = False
        self._written: Counter[int] = Counter()
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
                self._write(line)

    def _write(self, line: str) -> None:
        """Log a line at its own level, those of a trace as errors; what says no level is for the job's log alone."""
        word, _, rest = line.partition(" ")
        level, text = LEVELS.get(word, logging.DEBUG), rest if word in LEVELS else line
        if self._in_trace or line == TRACE:
            # A trace's last line is the first that is not indented.
            self._in_trace = line == TRACE or line.startswith(" ")
            level, text = logging.ERROR, line
        self._written[level] += 1
        if self._written[level] <= MOST_LINES:
            self.log.log(level, "%s", text)
        elif self._written[level] == MOST_LINES + 1:
            self.log.log(level, "%s: further lines of this level are in the log of its Ray job alone", self.stage)

    def close(self) -> None:
        self.artifact.close()


def check_cancelled() -> None:
    """A cancel from the UI does not reach a flow that was started from a shell, nor does a suspension reach any: they
    have to look. StageCancelled, or Prefect's Pause, which ends the process until a worker is to start it again."""
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(flow_run.id).state
    except httpx.HTTPError:
        # A server that is busy or being restarted is asked again later.
        return
    if state is not None and (state.is_cancelling() or state.is_cancelled()):
        raise StageCancelled("cancelled from Prefect")
    if state is not None and state.is_paused() and state.state_details.pause_reschedule:
        raise Pause("suspended from Prefect", state=state)

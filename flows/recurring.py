"""Distillation on a schedule: the same story, begun with new prompts, the promoted student, and what is left to spend.

    switchyard run configs/recurring.yaml --root runs/weekly

Each run is a cycle (``tasks/cycles.py``). One that was killed, cancelled or failed is continued by the
next run; with nothing to do the run ends as completed, and says so.
"""

from typing import Any

from prefect import flow
from prefect.states import Completed, Failed

from flows.artifacts import name_run
from flows.cycle import NothingToDo, Start, begin
from flows.distill import approve, tell
from flows.ends import end_of
from flows.record import RunRecord, load_record
from flows.runner import Runner, run_name
from infra.manifest import load_manifest
from infra.store import Store, open_store
from tasks.accounts import teacher_queries
from tasks.config import RunConfig
from tasks.config.preset import Settings
from tasks.cycles import read_cycles, update
from tasks.stage import StageSpec


class CycleRunner(Runner):
    """A runner that notes in its cycle what its prompts stage took."""

    start: Start

    def perform(self, spec: StageSpec) -> str:
        path = super().perform(spec)
        if spec.stage == "prompts":
            assert self.start.cycle
            number, waits = self.start.cycle.number, load_manifest(self.store, path).facts.get("waits")
            if waits:
                update(self.store, self.config.name, number, state="waited", queries=0, files={})
                raise NothingToDo(f"nothing new: {waits}; they wait")
            update(self.store, self.config.name, number, prompts=path)
        return path

    def close_cycle(self) -> None:
        """The run ended well: what it took, kept and was charged is final."""
        assert self.start.cycle
        manifests = self.record.manifests(self.store)
        update(
            self.store,
            self.config.name,
            self.start.cycle.number,
            state="done",
            kept=[manifests[name].path for name in ("warmup-keep", "keep") if name in manifests],
            queries=teacher_queries(manifests) or 0,
        )


@flow(name="distill-recurring", flow_run_name=run_name, log_prints=False, validate_parameters=False)
def distill_recurring(config: Settings, root: str = "runs/default", approved: bool = False) -> Any:
    """Distil what is new: prompts no run took before in, a student that beats the promoted one out, or a reason.
    ``approved``: what budget.approve_above would ask for is agreed to."""
    # The plan follows the story, so it knows its file.
    from flows.prelude import planned

    try:
        settings = planned(config, root)
        if settings.recurring is None:
            return Failed(message="recurring: a recurring run needs this section: add it, {} will do")
        return cycle(settings, root, approved)
    except NothingToDo as nothing:
        name_run(f"{settings.name}: {str(nothing).partition(';')[0].partition(':')[0]}")
        return Completed(message=str(nothing), data=nothing_done(str(nothing)))
    except Exception as error:
        return end_of(error)


def cycle(config: RunConfig, root: str, approved: bool) -> Any:
    """One cycle, from where it stands to its end."""
    start = begin(config, open_store(root))
    assert start.cycle
    files = len(start.cycle.all_files)
    name_run(f"{config.name} {start.cycle.number}" + (f", {files} new file{'s' * (files != 1)}" if files else ""))
    with CycleRunner.open(start.config, root, run=start.run) as runner:
        runner.start = start
        found = {**start.found, "promoted": runner.record.promoted}
        approve(runner, found, approved)
        tell(runner, found)
        runner.close_cycle()
        result = runner.outcome()
    said = "promoted" if result["promoted"] else "not promoted"
    return Completed(message=f"{said}: {result['reason']}", data=result)


def nothing_done(message: str) -> dict[str, Any]:
    """The facts of a run that had nothing to do, for programs."""
    unknown = dict.fromkeys(("run", "report", "student", "promoted", "reason", "gate", "metrics"))
    return {**unknown, "state": "Completed", "message": message, "seconds": 0.0, "stages": []}


def last_record(store: Store, name: str) -> RunRecord | None:
    """Of the latest cycle's run."""
    last = read_cycles(store, name)[0].last
    return load_record(store, last.run) if last else None

"""The spine: each stage is one Prefect task that submits one Ray job, watches it, and reads its manifest.

The flow is no Ray driver: it talks to the cluster through the Jobs API only, so that a cancel or Ctrl-C unwinds here
and ends the job, whatever Ray is doing. Every path out of ``perform`` stops the job it started.
"""

import shlex
import sys
import threading
import time
from contextlib import ExitStack, suppress
from typing import Any, Self

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import Pause, TerminationSignal
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed

from flows.approval import agreed
from flows.artifacts import publish, summarise
from flows.console import outlive_readers
from flows.cycle import NothingToDo
from flows.display import display
from flows.ends import StageCancelled, StageDamaged, StageFailed, StageRefused
from flows.gpus import gpus_at_once
from flows.notify import announce
from flows.record import RunRecord, StageRecord, load_record, outcome, rival_of, run_id
from flows.slots import AT_WORK, held
from flows.story import Pipeline
from flows.trackers import Following
from flows.watch import StageWatch, check_cancelled
from infra.cluster import FINAL, QUIET, Cluster, Job, running_jobs, stop_jobs, submit
from infra.faults import fault_of
from infra.lease import RENEW_SECONDS, lease_path
from infra.manifest import load_manifest
from infra.process import undisturbed
from infra.store import open_store
from tasks.config import RunConfig
from tasks.promoted import current
from tasks.stage import StageSpec

POLL_SECONDS = 0.3
STATE_SECONDS = 2.0
# How long a job server may be silent, as while its head is started anew elsewhere.
SILENT_SECONDS = 600.0


class Runner(Pipeline):
    """Runs the story. Opens the cluster and the engine room on first need, so a fully reused run starts neither."""

    def __init__(self, config: RunConfig, root: str, record: RunRecord) -> None:
        super().__init__(config, root, record.run, record.redo)
        self.record = record
        self.cluster = Cluster(config.resources.ray_address, waiting=self._look)
        self.room: Job | None = None
        self.slots: ExitStack | None = None
        self.began = self._looked = time.monotonic()
        self._ended: BaseException | None = None
        self._closed = threading.Event()

    @classmethod
    def open(cls, config: RunConfig, root: str, redo_from: str | None = None, run: str = "") -> Self:
        """The run of these settings, new or continued; ``run`` names another run of the same settings."""
        store, run = open_store(root), run or run_id(config)
        known = load_record(store, run)
        redo = dict(known.redo) if known else {}
        if redo_from:
            redo[redo_from] = redo.get(redo_from, 0) + 1
        record = RunRecord(
            run=run,
            name=config.name,
            root=store.uri,
            config=config.model_dump(mode="json"),
            redo=redo,
            promoted=rival_of(store, config, known),
            approved=not redo_from and agreed(known, config.budget),
            touched=known.touched if known else {},
        )
        record.save(store)
        return cls(config, root, record)

    def __enter__(self) -> Self:
        outlive_readers()
        threading.Thread(target=self._renew_lease, daemon=True, name="lease").start()
        self.following = Following(self.config, self.run, self.store, get_run_logger())
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._closed.set()
        with undisturbed():
            self._close(error)

    def _close(self, error: BaseException | None) -> None:
        """Leave the record, and nothing that runs."""
        cancelled = isinstance(error, StageCancelled | Pause | KeyboardInterrupt | SystemExit | TerminationSignal)
        well = error is None or isinstance(error, NothingToDo)
        self.record.state = "Completed" if well else "Cancelled" if cancelled else "Failed"
        self.record.message = "" if error is None else " ".join(str(error).split())[:1000]
        self.record.refused = isinstance(error, StageRefused)
        self.record.seconds = time.monotonic() - self.began
        try:
            self.record.save(self.store)
        except Exception as fault:
            # What ended the run is the cause to tell; processes must end all the same.
            if error is None or fault_of(fault) is None:
                raise
        try:
            # A head of our own ends with everything on it. On another's, a job may run whose submission was cut off.
            if self.cluster.started and not self.cluster.own:
                with suppress(OSError, RuntimeError):
                    jobs = running_jobs(self.cluster).items()
                    stop_jobs(self.cluster, [job for job, data in jobs if self._metadata.items() <= data.items()])
        finally:
            self.cluster.close()
            if self.slots:
                self.slots.close()
            self.following.close(self.record.state)

    def outcome(self) -> dict[str, Any]:
        """Facts of the finished run. Its record is written as completed first."""
        self.record.state, self.record.seconds = "Completed", time.monotonic() - self.began
        publish(self.record, self.store)
        summarise(self.record, self.store)
        promotion = current(self.store, self.config.name)
        report = self.record.stages[-1]
        if promotion and promotion.fingerprint == report.fingerprint and not report.reused:
            announce(promotion, self.store)
        return outcome(self.record, self.store)

    def perform(self, spec: StageSpec) -> str:
        """One stage as a Prefect task, in the flow's own thread."""
        name = spec.stage
        run = Task(fn=self._task, name=name, task_run_name=name, cache_policy=NO_CACHE, persist_result=False)
        self._ended = None
        state = run(spec, return_state=True)
        if self._ended:
            raise self._ended
        if not state.is_completed():
            # An error that nobody foresaw: raised as it was.
            state.result()
        entry = self.record.stages[-1]
        manifest = load_manifest(self.store, spec.manifest_path)
        display().finished(name, manifest, reused=entry.reused, seconds=entry.seconds)
        self.following.finished(name, manifest)
        return spec.manifest_path

    def _task(self, spec: StageSpec) -> Any:
        """The task: an expected end is a state with its cause in one line, not a trace."""
        try:
            self._stage(spec)
        except StageFailed as failed:
            self._ended = failed
            return Failed(message=str(failed))
        except (StageCancelled, Pause, TerminationSignal) as cancelled:
            # A worker ends its flows by signal; what it means by that, Prefect knows outside of the task.
            self._ended = cancelled
            return Cancelled(message=str(cancelled) or "its flow was ended")
        except Exception as error:
            fault = fault_of(error)
            if fault is None:
                raise
            self._ended = StageFailed(f"{spec.stage}: {fault.line}")
            return Failed(message=str(self._ended))
        entry = self.record.stages[-1]
        tries = f"after {entry.attempts} attempts" if entry.attempts > 1 else None
        return Completed(message="reused" if entry.reused else tries)

    def _stage(self, spec: StageSpec) -> None:
        """See that the stage's manifest stands."""
        entry = StageRecord(name=spec.stage, fingerprint=spec.fingerprint, manifest=spec.manifest_path)
        self.record.stages.append(entry)
        self.record.touched[spec.stage] = spec.manifest_path
        began = time.monotonic()
        if self.store.exists(spec.manifest_path):
            entry.reused = True
        else:
            self.record.save(self.store)
            display().started(spec.stage)
            self.following.started(spec.stage)
            self._hold_slots(spec)
            while not self._attempt(spec, entry):
                get_run_logger().warning("%s ended without a result; attempt %d", spec.stage, entry.attempts + 1)
        entry.seconds = time.monotonic() - began
        self.record.save(self.store)

    def _hold_slots(self, spec: StageSpec) -> None:
        """Before the run's first stage on GPUs: wait for them, and hold them to the run's end."""
        name, count = self.config.resources.gpu_slots, gpus_at_once(self.config)
        if name and count and self.slots is None and spec.module in AT_WORK:
            self.slots = ExitStack()
            self.slots.enter_context(held(name, count))

    def _attempt(self, spec: StageSpec, entry: StageRecord) -> bool:
        """Run the stage's job once. True: its manifest stands. False: it died and may be tried again."""
        check_cancelled()
        self._open_room()
        check_cancelled()
        entry.attempts += 1
        spec_path = f"{spec.folder}/spec.json"
        self.store.write(spec_path, spec.model_dump_json(indent=1).encode())
        job = self._submit(spec, entry, spec_path)
        watch = StageWatch(spec.stage, self.following)
        # On Ctrl-C and cancel the job must not outlive its flow: see ``_close``.
        self._watch(job, watch)
        watch.close()
        if self.store.exists(spec.manifest_path):
            return True
        if watch.damage:
            raise StageDamaged(f"{spec.stage}: {watch.damage}")
        if watch.error:
            raise StageRefused(f"{spec.stage}: {watch.error}")
        if watch.lasting:
            raise StageFailed(f"{spec.stage}: {watch.fault}")
        if entry.attempts > self.config.resources.stage_retries:
            said = watch.fault or watch.last_line
            raise StageFailed(f"{spec.stage}: its job ended {job.status} {entry.attempts} times; {said}")
        return False

    def _submit(self, spec: StageSpec, entry: StageRecord, spec_path: str) -> Job:
        """A job named by run, stage and attempt; an id that is taken by an ended job means the next attempt."""
        command = shlex.join(self._python("-m", spec.module, "--root", self.store.uri, "--spec", spec_path))
        number, metadata = entry.attempts, {**self._metadata, "fingerprint": spec.fingerprint}
        while True:
            try:
                job_id = f"{self.run}-{spec.stage}-{spec.fingerprint[:8]}-{number}"
                return submit(self.cluster, job_id, command, self._environment(), metadata)
            except ValueError:
                number += 1

    def _python(self, *arguments: str) -> list[str]:
        # On a cluster the image's own interpreter runs the stage.
        return [sys.executable if self.cluster.on_this_machine else "python", *arguments]

    def _environment(self) -> dict[str, str]:
        return {**QUIET, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}

    def _watch(self, job: Job, watch: StageWatch) -> None:
        """Follow the job to its end, which past the deadline is set to it. Raises StageCancelled, or StageFailed."""
        deadline = time.monotonic() + 60 * self.config.resources.stage_deadline_minutes
        while self._status(job) not in FINAL:
            watch.take(job.lines())
            if time.monotonic() > deadline:
                late = f"past resources.stage_deadline_minutes {self.config.resources.stage_deadline_minutes:g}"
                if not self.config.resources.retry_late_stages:
                    raise StageFailed(f"{watch.stage}: {late}")
                watch.fault = late
                stop_jobs(self.cluster, [job.id])
                break
            if self._look():
                self._open_room()
            time.sleep(POLL_SECONDS)
        watch.take(job.rest())

    def _look(self) -> bool:
        """Whether it was time to see if somebody cancels the run; StageCancelled where they do."""
        if due := time.monotonic() - self._looked > STATE_SECONDS:
            self._looked = time.monotonic()
            check_cancelled()
        return due

    def _status(self, job: Job) -> str:
        """The job's state, waited for: it goes on, or is begun again, once its cluster answers."""
        deadline = time.monotonic() + SILENT_SECONDS
        while True:
            try:
                return job.status
            except ConnectionError as error:
                if time.monotonic() > deadline:
                    where = f"the job server at {self.cluster.address}"
                    raise StageFailed(f"{where} does not answer ({error}); the same command continues") from None
                if self.cluster.ended:
                    raise StageFailed("the Ray head of this run ended; the same command continues") from None
                check_cancelled()
                time.sleep(STATE_SECONDS)

    def _open_room(self) -> None:
        """See that the run's engine room is open; a room that ended is replaced under a new id."""
        if self.config.resources.engine_room or (self.room and self._status(self.room) not in FINAL):
            return
        self._write_lease(0)
        arguments = ("-m", "infra.engine_room", "--namespace", f"switchyard-{self.run}")
        place = ("--root", self.store.uri, "--lease", lease_path(self.run))
        self.room = submit(
            self.cluster,
            f"{self.run}-room-{time.time_ns():x}",
            shlex.join(self._python(*arguments, *place)),
            self._environment(),
            self._metadata,
        )

    @property
    def _metadata(self) -> dict[str, str]:
        """Of every job of this run: whose it is, and where its lease lies."""
        return {"run": self.run, "root": self.store.uri}

    def _write_lease(self, count: int) -> None:
        self.store.write(lease_path(self.run), f"{self.began}:{count}".encode())

    def _renew_lease(self) -> None:
        count = 0
        while not self._closed.wait(RENEW_SECONDS):
            if self.room:
                count += 1
                try:
                    self._write_lease(count)
                except Exception as error:
                    # The next renewal makes up for one that a fault of the store prevented.
                    if fault_of(error) is None:
                        raise


def run_name() -> str:
    """What a flow run is called: the name in its settings, or its preset. Settings are not checked yet here."""
    config = flow_run.parameters.get("config")
    known = config if isinstance(config, dict) else {"name": getattr(config, "name", None)}
    return str(known.get("name") or known.get("preset") or "unnamed")

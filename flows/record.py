"""A run's record in the store: its settings, its stages, how it stands. ``runs/<run>/run.json``."""

from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, Field

from infra.manifest import Manifest, fingerprint, load_manifest, parsed, sealed
from infra.store import Store, StorePath
from tasks.config import RunConfig
from tasks.config.run import OPERATIONAL
from tasks.promoted import Promotion, current


class StageRecord(BaseModel):
    """One stage of a run."""

    name: str
    fingerprint: str
    manifest: StorePath
    seconds: float = 0.0
    reused: bool = False
    attempts: int = 0


class RunRecord(BaseModel):
    """What ``show``, ``verify`` and the next ``run`` need to know."""

    run: str
    name: str
    root: str
    config: dict[str, Any]
    state: str = "Running"
    message: str = ""
    refused: bool = False  # a stage found a user's mistake
    approved: bool = False  # what it spends was agreed to
    redo: dict[str, int] = Field(default_factory=dict)
    stages: list[StageRecord] = Field(default_factory=list)
    promoted: Promotion | None = None  # as it stood when the run began: what a new student has to beat
    # Latest manifest of every stage, by name, over all attempts.
    touched: dict[str, StorePath] = Field(default_factory=dict)
    started: datetime = Field(default_factory=lambda: datetime.now(UTC))
    finished: datetime | None = None
    seconds: float = 0.0

    @property
    def path(self) -> str:
        return record_path(self.run)

    def save(self, store: Store) -> None:
        store.write(self.path, sealed(self))

    def manifests(self, store: Store) -> dict[str, Manifest]:
        """Manifests of the stages that are complete, by name."""
        return {
            stage.name: load_manifest(store, stage.manifest) for stage in self.stages if store.exists(stage.manifest)
        }


def record_path(run: str) -> str:
    return f"runs/{run}/run.json"


def run_id(config: RunConfig) -> str:
    """Name and hash of what the run computes: the same settings are the same run, wherever its models are served."""
    return f"{config.name}-{fingerprint(config.model_dump(mode='json', exclude=OPERATIONAL))[:8]}"


def load_record(store: Store, run: str) -> RunRecord | None:
    try:
        return parsed(store, record_path(run), store.read(record_path(run)), RunRecord)
    except FileNotFoundError:
        return None


def rival_of(store: Store, config: RunConfig, known: RunRecord | None) -> Promotion | None:
    """The student to beat: the one promoted when the run began, for a run that continues; else the one promoted now."""
    return known.promoted if known else current(store, config.name)


def find_record(store: Store, run: str) -> RunRecord:
    """The record of a run by its id or by the start of it; ValueError with the known ones."""
    known = [path.split("/")[1] for path in store.list("runs") if path.endswith("/run.json")]
    matching = [name for name in known if name == run] or [name for name in known if name.startswith(run)]
    if len(matching) != 1:
        raise ValueError(f"run: {run!r} names {len(matching)} of the runs in {store.uri}: {', '.join(known) or 'none'}")
    record = load_record(store, matching[0])
    assert record is not None, "listed a moment ago"
    return record


def place(store: Store, path: str | None) -> str | None:
    """What a person opens, where there is something."""
    return store.location(path) if path else None


def outcome(record: RunRecord, store: Store) -> dict[str, Any]:
    """The facts of a run for programs: what ``switchyard run --json`` prints."""
    manifests = record.manifests(store)
    facts = manifests["report"].facts if "report" in manifests else {}
    rows = {
        name: {table: entry.rows for table, entry in manifest.tables.items()} for name, manifest in manifests.items()
    }
    return {
        "run": record.run,
        "state": record.state,
        "message": record.message,
        "report": place(store, facts.get("report")),
        "student": place(store, facts.get("student")),
        "promoted": facts.get("promoted"),
        "reason": facts.get("reason"),
        "gate": facts.get("gate"),
        "metrics": facts.get("metrics"),
        "seconds": round(record.seconds, 1),
        "stages": [
            {
                "name": stage.name,
                "fingerprint": stage.fingerprint,
                "rows": rows.get(stage.name, {}),
                "seconds": round(stage.seconds, 1),
                "reused": stage.reused,
            }
            for stage in record.stages
        ],
    }

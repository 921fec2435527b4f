"""Report: one self-contained page that says whether the student learned, the finished student, and its promotion.

    python -m tasks.report --spec SPEC.json

Table: ``metrics``, by source too. Files: ``report`` (index.html without any outside reference, overview.png) and
``student`` (the trained folder with its final model card). An input that is absent, as in ablations, leaves its section
out. Only evaluated labels have values in facts ``metrics``; the others' are null.
"""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa

from infra.manifest import File
from infra.models import ModelRef
from infra.parts import read_rows
from tasks import schemas
from tasks.accounts import Manifests
from tasks.card import card
from tasks.config.base import Config
from tasks.config.budget import Budget
from tasks.config.evaluate import EvaluateConfig, PromoteConfig
from tasks.config.run import RunConfig
from tasks.metrics import EVALUATION_COLUMNS, LOSS_COLUMNS, Results, as_table, measure
from tasks.promote import Decision, Rival, decide
from tasks.promoted import promote
from tasks.stage import Stage, main
from tasks.value import quality_for_cost
from tasks.verdict import headline, verdict

STEPS = 4
OVERTAKEN = "another student was promoted, or the promoted one rolled back, while this run went on"


class ReportSettings(Config):
    """What the report says of the run, and how it judges."""

    name: str
    """Name of the run."""
    seed: int = 0
    """Seed of the run; resamples and the choice of shown samples follow it."""
    config: dict[str, Any]
    """The settings of the run that decide its results."""
    evaluate: EvaluateConfig
    """Intervals."""
    promote: PromoteConfig
    """The gate of the promotion."""
    rival: Rival | None = None
    """The student promoted when the run began; none where absent."""
    budget: Budget
    """What might be asked of the teacher."""


def whole(stage: Stage[ReportSettings]) -> RunConfig:
    """All settings of the run, those that decide no result included."""

    def merged(one: Any, other: Any) -> Any:
        if isinstance(one, list) and isinstance(other, list):
            return [merged(*pair) for pair in zip(one, other, strict=True)]
        if not (isinstance(one, dict) and isinstance(other, dict)):
            return other
        return {**one, **other, **{name: merged(one[name], other[name]) for name in one.keys() & other.keys()}}

    return RunConfig.model_validate(merged(stage.settings.config, stage.spec.runtime.operational))


def results_of(stage: Stage[ReportSettings], manifests: Manifests) -> Results:
    """Metrics over both evaluations; tables may be absent."""
    evaluated = [manifests[name] for name in ("evaluate-before", "evaluate-after") if name in manifests]

    def joined(table: str, schema: pa.Schema, wanted: list[str]) -> pa.Table:
        empty = schema.empty_table().select(wanted)
        return pa.concat_tables([empty, *(read_rows(stage.store, found, table, wanted) for found in evaluated)])

    return measure(
        joined("evaluations", schemas.EVALUATION, EVALUATION_COLUMNS),
        joined("losses", schemas.RESPONSE_LOSS, LOSS_COLUMNS),
        stage.settings.evaluate,
        stage.settings.seed,
    )


def finish_student(stage: Stage[ReportSettings], manifests: Manifests, results: Results) -> ModelRef | None:
    """Copy the last trained student inside the store, with a new model card; None where nothing was trained."""
    trained = next((manifests[name] for name in ("train", "warmup-train") if name in manifests), None)
    if trained is None or "student" not in trained.files:
        return None
    source, target = f"{trained.folder}/files/student", f"{stage.spec.folder}/files/student"
    student = ModelRef.model_validate(trained.facts["models"]["student"]).model_copy(update={"path": target})
    text = card(whole(stage), manifests, results, student, stage.spec.fingerprint).encode()
    readme = File(path=f"{target}/README.md", bytes=len(text), sha256=hashlib.sha256(text).hexdigest())
    files = [readme]
    for file in trained.files["student"]:
        path = target + file.path.removeprefix(source)
        if path != readme.path:
            stage.store.copy(file.path, path)
            files.append(file.model_copy(update={"path": path}))
    stage.store.write(readme.path, text)
    stage.manifest.files["student"] = sorted(files, key=lambda file: file.path)
    return student


def move(stage: Stage[ReportSettings], decision: Decision) -> bool:
    """Make the student the promoted one. False where another came first."""
    facts, rival = stage.facts, stage.settings.rival
    entry = promote(
        stage.store,
        stage.settings.name,
        rival.fingerprint if rival else None,
        run=stage.spec.runtime.run,
        fingerprint=stage.spec.fingerprint,
        manifest=stage.spec.manifest_path,
        reason=decision.reason,
        **{key: facts[key] for key in ("student", "report", "verdict", "metrics")},
    )
    facts["promotion"] = entry.number if entry else None
    return entry is not None


def run(stage: Stage[ReportSettings]) -> None:
    # Matplotlib and jinja take a second to import; settings are read by others too.
    from tasks import page

    settings, facts = stage.settings, stage.facts
    manifests = {name: stage.input(name) for name in stage.spec.inputs}
    stage.progress(0, STEPS, "steps", now="metrics")
    results = results_of(stage, manifests)
    stage.write_table("metrics", as_table(results))
    facts.update(
        metrics=results.metrics,
        differences=results.differences,
        quality_for_cost=quality_for_cost(results.differences["final-base"], manifests, settings.budget),
        heldout=results.problems,
        headline=headline(results),
        verdict=verdict(results, settings.evaluate.confidence),
    )
    stage.progress(1, STEPS, "steps", now="student")
    student = finish_student(stage, manifests, results)
    decision = decide(results, settings.promote, student is not None, settings.rival)
    facts["student"] = student.path if student else None
    facts["models"] = {"student": student.model_dump()} if student else {}

    stage.progress(2, STEPS, "steps", now="page")

    def write_page() -> None:
        with tempfile.TemporaryDirectory() as temporary:
            page.write(Path(temporary), stage, whole(stage), manifests, results, decision)
            place = stage.add_files("report", Path(temporary))
        facts.update(report=f"{place}/index.html", overview=f"{place}/overview.png")

    write_page()
    stage.progress(3, STEPS, "steps", now="promotion")
    if decision.promoted and not move(stage, decision):
        decision = decision._replace(promoted=False, reason=OVERTAKEN)
        write_page()
    facts.update(
        promoted=decision.promoted, reason=decision.reason, gate=[check._asdict() for check in decision.checks]
    )
    stage.log.info("%s", facts["verdict"])
    stage.progress(STEPS, STEPS, "steps", last=True)


if __name__ == "__main__":
    main(ReportSettings, run)

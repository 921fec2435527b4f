"""What leads nowhere is garbage, what a promotion came from never is; and a row's way back is complete."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pytest

from flows.cli import main
from flows.record import RunRecord
from flows.trace import trace
from flows.upkeep import garbage, verify
from infra.manifest import Manifest, commit_manifest
from infra.parts import commit_part, table_entry
from infra.store import LocalStore, Store
from tasks import schemas
from tasks.promoted import promote
from tasks.replay import ReplaySettings
from tasks.replay import run as replay
from tasks.stage import Stage, StageSpec


def stage(
    store: Store,
    name: str,
    mark: str,
    inputs: Sequence[Manifest] = (),
    tables: Mapping[str, tuple[pa.Schema, list[Any]]] = MappingProxyType({}),
) -> Manifest:
    manifest = Manifest(
        stage=name,
        module=f"tasks.{name}",
        version=1,
        fingerprint=mark * 16,
        settings={},
        inputs={made.stage: made.path for made in inputs},
    )
    for table, (schema, rows) in tables.items():
        part = commit_part(store, manifest.folder, table, 0, pa.Table.from_pylist(rows, schema))
        manifest.tables[table] = table_entry(schema, [part])
    if name == "models":
        manifest.facts["models"] = {"teacher": {"name": "big", "revision": "r1"}}
    return commit_manifest(store, manifest)


def record(store: Store, *made: Manifest, state: str = "Completed", number: int = 1) -> RunRecord:
    run = RunRecord(
        run=f"mine-{number}",
        name="mine",
        root=store.uri,
        config={"seed": 4 + number},
        state=state,
        stages=[{"name": each.stage, "fingerprint": each.fingerprint, "manifest": each.path} for each in made],
        touched={each.stage: each.path for each in made},
    )
    run.save(store)
    return run


def test_what_no_run_and_no_promotion_leads_to_is_garbage(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    models = stage(store, "models", "a")
    old, new = (stage(store, "train", mark, [models]) for mark in "bc")
    promoted = stage(store, "report", "d", [old])
    record(store, models, new)
    lost = stage(store, "train", "e", [models])
    promote_report(store, "mine", promoted)
    found = garbage(store)
    assert set(found.folders) == {lost.folder}
    assert found.kept == 4
    for path in list(store.list("promoted")):
        store.delete(path)
    assert set(garbage(store).folders) == {lost.folder, old.folder, promoted.folder}


def spec_of(store: Store, made: Manifest) -> None:
    """As the runner writes it before a stage begins."""
    spec = StageSpec(stage=made.stage, module=made.module, inputs=made.inputs, root=store.uri)
    store.write(f"{made.folder}/spec.json", spec.model_dump_json().encode())


def collect(monkeypatch: pytest.MonkeyPatch, store: Store, *options: str) -> int:
    """``switchyard gc``; its exit code."""
    monkeypatch.setattr("sys.argv", ["switchyard", "gc", "--root", store.uri, *options])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_gc_removes_garbage_and_nothing_that_a_missing_manifest_leads_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    tables = {"kept": (schemas.KEPT, [{"row_id": "a"}])}
    models, lost = stage(store, "models", "a"), stage(store, "keep", "e", tables=tables)
    kept = stage(store, "keep", "b", [models], tables)
    train = stage(store, "train", "c", [kept])
    promoted = stage(store, "report", "d", [train])
    promote_report(store, "mine", promoted)
    for made in (train, promoted):
        spec_of(store, made)
        store.delete(made.path)  # damage made a reader forget it
    objects = set(store.list("stages"))
    assert collect(monkeypatch, store) == 0
    assert set(store.list("stages")) == objects
    assert collect(monkeypatch, store, "--yes") == 0
    assert objects - set(store.list("stages")) == {path for path in objects if path.startswith(lost.folder)}
    store.write(f"{train.folder}/spec.json", b"{")
    assert collect(monkeypatch, store, "--yes") == 2
    assert all(map(store.exists, (models.path, kept.path)))


def test_gc_keeps_what_a_run_came_to_need_before_the_confirmation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    wanted, lost = stage(store, "train", "b"), stage(store, "train", "c")

    def agree(state: str) -> Callable[[str], bool]:
        return lambda _: bool(record(store, wanted, state=state))

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("typer.confirm", agree("Running"))
    assert collect(monkeypatch, store) == 2
    assert store.exists(lost.path)
    store.delete("runs/mine-1/run.json")
    monkeypatch.setattr("typer.confirm", agree("Completed"))
    assert collect(monkeypatch, store) == 0
    assert store.exists(wanted.path)
    assert not list(store.list(lost.folder))


def promote_report(store: Store, name: str, report: Manifest, over: str | None = None) -> None:
    facts = {"student": "s", "report": "r", "reason": "", "verdict": "", "metrics": {}}
    mark = {"run": f"{name}-1", "fingerprint": report.fingerprint, "manifest": report.path}
    assert promote(store, name, over, **mark, **facts)


def test_nothing_is_garbage_while_a_run_goes_on(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    record(store, stage(store, "models", "a"), state="Running")
    with pytest.raises(ValueError, match="run mine-1 has not ended"):
        garbage(store)


def test_stages_that_a_killed_run_had_made_are_kept(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    models, later = stage(store, "models", "a"), stage(store, "annotate", "b")
    run = record(store, models, later, state="Cancelled")
    run.stages = run.stages[:1]  # killed again, earlier
    run.save(store)
    assert not garbage(store).folders


def test_a_row_leads_back_to_prompt_samples_scores_and_models(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    ids = {"prompt_id": "p1", "sample_id": "s1"}
    prompt = {"prompt_id": "p1", "messages": [{"role": "user", "content": "1 + 1?"}]}
    signal = {"prompt_id": "p1", "unique_answers": 3, "reason": "selected"}
    own = [{"prompt_id": "p1", "sample_id": f"own{i}", "text": str(i)} for i in range(2)] + [{"prompt_id": "p2"}]
    made = [
        stage(store, "models", "a"),
        stage(store, "prompts", "b", tables={"candidates": (schemas.PROMPT, [prompt])}),
        stage(store, "student-sample", "c", tables={"samples": (schemas.SAMPLE, own)}),
        stage(store, "select", "d", tables={"signals": (schemas.SIGNAL, [signal])}),
        stage(store, "annotate", "e", tables={"samples": (schemas.SAMPLE, [ids | {"seed": 9, "text": "2"}])}),
        stage(
            store,
            "keep",
            "f",
            tables={
                "kept": (schemas.KEPT, [ids | {"row_id": "s1"}]),
                "scores": (schemas.SCORE, [ids | {"ta_teacher": 0.5}]),
            },
        ),
    ]
    run = record(store, *made)
    found = trace(store, run, "s1")
    assert found["prompt"]["messages"][0]["content"] == "1 + 1?"
    assert found["teacher's answer"]["seed"] == 9
    assert found["TA's score"]["ta_teacher"] == 0.5
    assert found["signals"]["unique_answers"] == 3
    assert [row["sample_id"] for row in found["student's answers"]] == ["own0", "own1"]
    assert found["models"] == {"teacher": "big at r1"}
    assert found["seed"] == 5
    with pytest.raises(ValueError, match="trained on no such row"):
        trace(store, run, "s2")
    assert found["other annotations"] == []
    assert all(not damages for _, damages in verify(store, run, repair=False))


def test_a_replayed_row_leads_back_through_the_run_that_kept_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = LocalStore(tmp_path)

    def kept(mark: str, row: str, *inputs: Manifest) -> Manifest:
        ids = {"row_id": row, "sample_id": row, "prompt_id": f"p-{row}"}
        rows = {"kept": (schemas.KEPT, [ids | {"token_ids": [7]}]), "scores": (schemas.SCORE, [ids | {"text": "2"}])}
        return stage(store, "keep", mark, inputs, rows)

    models = stage(store, "models", "a")
    prompt = {"prompt_id": "p-old", "messages": [{"role": "user", "content": "1 + 1?"}]}
    prompts = stage(store, "prompts", "b", [models], {"candidates": (schemas.PROMPT, [prompt])})
    answer = {"prompt_id": "p-old", "sample_id": "old", "seed": 9}
    annotate = stage(store, "annotate", "c", [prompts], {"samples": (schemas.SAMPLE, [answer])})
    old, new = kept("d", "old", models, annotate), kept("e", "new", models)
    record(store, models, prompts, annotate, old)
    settings = {"share": 0.5, "draw": 2, "rows": ["keep"], "earlier": ["earlier-1"]}
    inputs = {"models": models.path, "keep": new.path, "earlier-1": old.path}
    spec = StageSpec(stage="replay", module="tasks.replay", root=store.uri, settings=settings, inputs=inputs)
    drawn = Stage(spec, ReplaySettings.model_validate(settings))
    replay(drawn)
    run = record(store, models, new, commit_manifest(store, drawn.manifest), number=2)
    assert "replayed from" not in trace(store, run, "new")
    monkeypatch.setattr("sys.argv", ["switchyard", "trace", "old", "--run", run.run, "--root", store.uri])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    said = capsys.readouterr()
    assert "replayed from" in said.out + said.err
    found = json.loads(said.out.splitlines()[-1])
    assert found["replayed from"] == {"run": "mine-1", "manifest": old.path}
    assert found["teacher's answer"]["seed"] == 9
    assert found["prompt"]["messages"][0]["content"] == "1 + 1?"
    assert found["TA's score"]["text"] == "2"
    store.delete(old.path)
    with pytest.raises(ValueError, match="not there any more"):
        trace(store, run, "old")


def test_a_stand_in_leads_back_to_the_student_and_to_what_it_replaced(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    own = {"prompt_id": "p1", "sample_id": "own0", "text": "4"}
    scores = [{"prompt_id": "p1", "sample_id": "s1", "reason": "replaced"}, own | {"reason": "stand_in"}]
    kept = {"prompt_id": "p1", "sample_id": "own0", "row_id": "own0"}
    run = record(
        store,
        stage(store, "student-sample", "c", tables={"samples": (schemas.SAMPLE, [own])}),
        stage(store, "keep", "f", tables={"kept": (schemas.KEPT, [kept]), "scores": (schemas.SCORE, scores)}),
    )
    found = trace(store, run, "own0")
    assert found["TA's score"]["reason"] == "stand_in"
    assert found["student's answer that stands in"]["text"] == "4"
    assert [row["reason"] for row in found["other annotations"]] == ["replaced"]

"""The training stage under Ray Train: both stage types, several workers, a crash, and what a user gets wrong."""

import json
import math
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file
from toys import EOS, commit_inputs, kept_rows, pair, save_model, stage_of
from transformers import AutoModelForCausalLM

from infra.parts import read_rows
from infra.s3 import S3Store
from infra.store import LocalStore
from tasks.loop import Loop, proceed, start
from tasks.resume import newest, storage
from tasks.schemas import KEPT, POSITION, STEP
from tasks.stage import MARK, Stage
from tasks.student import World
from tasks.train import TrainSettings, plan_of, run, smaller
from tasks.workers import fit

torch.set_num_threads(1)
SWITCH = {"type": "switch", "max_new_tokens": 10, "block": 4}
MINILLM = {"type": "minillm", "max_new_tokens": 10, "block": 4, "collected_batches": 1, "epochs": 2}
DISTILLM = {"type": "distillm", "max_new_tokens": 10, "first_share": 0.7, "capacity": 5}
SHORT = {"steps": 6, "micro_batch": 4, "validate_every": 3, "checkpoint_every": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    return LocalStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def inputs(store: LocalStore) -> dict[str, str]:
    models = pair(store)
    stranger = models["teacher"].model_copy(update={"name": "stranger", "tokenizer_hash": "another"})
    return commit_inputs(store, {**models, "stranger": stranger}, kept_rows(48))


def curve(stage: Stage[TrainSettings]) -> Any:
    """The committed curve without its times."""
    steps = read_rows(stage.store, stage.manifest, "steps")
    assert steps.schema.equals(STEP)
    return steps.drop_columns(["seconds", "rollout_seconds"])


def alone(stage: Stage[TrainSettings], folder: Path) -> tuple[Loop, dict[str, torch.Tensor]]:
    """The same stage on one worker in this process: its loop and its student's weights."""
    loop, weights = start(plan_of(stage), World(0, 1, torch.device("cpu")), None), {}
    assert loop

    def report(source: Path, step: int) -> None:
        if step == stage.settings.train.steps:
            weights.update(load_file(source / "student" / "model.safetensors"))

    proceed(loop, report, lambda row: None)
    return loop, weights


def test_sft_stage_commits_a_student(
    cluster: None, store: LocalStore, inputs: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    stage = stage_of(store, inputs, {**SHORT, "method": {"type": "sft"}}, stage_name="warmup")
    run(stage)
    loop, weights = alone(stage, tmp_path)
    student = stage.facts["models"]["student"]
    folder = store.localise(student["path"])
    committed = load_file(folder / "model.safetensors")
    assert all(torch.equal(committed[name], weight) for name, weight in weights.items())
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == EOS
    assert {"README.md", "config.json", "generation_config.json", "tokenizer.json"} <= {
        p.name for p in folder.iterdir()
    }
    assert "stage warmup" in (folder / "README.md").read_text()
    assert student["revision"] != "student-1"
    assert student["tokenizer_hash"] == "toy"
    assert curve(stage)["step"].to_pylist() == [1, 2, 3, 4, 5, 6]
    assert read_rows(store, stage.manifest, "positions").schema.equals(POSITION)
    assert loop.state.best
    assert stage.facts["best_validation_loss"] == loop.state.best.loss
    assert stage.facts["data"]["rows"] + stage.facts["data"]["validation_rows"] == 48
    assert stage.facts["intervention_rate"] is None
    json.dumps(stage.facts, allow_nan=False)
    assert not (store.root / stage.spec.folder / "checkpoints").exists()
    marks = [json.loads(line[len(MARK) :]) for line in capsys.readouterr().out.splitlines() if line.startswith(MARK)]
    assert marks[-1]["done"] == marks[-1]["total"] == 6
    assert marks[-1]["unit"] == "steps"


@pytest.mark.parametrize(
    "method",
    [SWITCH, *(pytest.param(method, marks=pytest.mark.long) for method in (MINILLM, DISTILLM))],
    ids=lambda method: method["type"],
)
def test_stage_on_two_workers_is_that_on_one(
    cluster: None, store: LocalStore, inputs: dict[str, str], tmp_path: Path, method: dict[str, Any]
) -> None:
    train = {**SHORT, "method": method, "keep": "last", "micro_batch": 2, "batch_size": 8}
    stage = stage_of(store, inputs, train, {"workers": 2})
    run(stage)
    loop, weights = alone(stage, tmp_path)
    committed = load_file(store.localise(stage.facts["models"]["student"]["path"]) / "model.safetensors")
    for name, weight in weights.items():
        # Adam magnifies the rounding of gradients near 0: 6 steps of 1e-2 could part them by 0.12.
        torch.testing.assert_close(committed[name], weight, rtol=0, atol=2e-3, msg=name)
    rows, expected = curve(stage).to_pylist(), loop.state.steps
    exact = ("step", "tokens", "teacher_tokens", "response_length", "eos_rate", "intervention_rate", "pooled", "phi")
    rounded = ("loss", "loss_on_policy", "loss_off_policy", "gradient_norm")
    for name in (*exact, *rounded):
        # A step without rollouts has no length of them.
        found, wanted = ([math.nan if row[name] is None else row[name] for row in part] for part in (rows, expected))
        assert found == pytest.approx(wanted, rel=1e-6 if name in exact else 1e-4, nan_ok=True), name
    counts = read_rows(store, stage.manifest, "positions").to_pydict()
    # Not the forwards: a row that ended is drafted on beside rows that did not.
    assert [counts[name] for name in POSITION.names[1:5]] == loop.state.positions[:4]
    assert (0 < stage.facts["intervention_rate"] < 1) == (method is not DISTILLM)
    assert (stage.facts["pooled"] > 0) == (method is not SWITCH)
    assert stage.facts["online_teacher_tokens"] == sum(counts["emitted"])
    assert stage.facts["rollouts"] == loop.state.prompts_drawn


@pytest.mark.long
def test_a_stage_begins_with_the_workers_there_is_room_for(
    cluster: None, store: LocalStore, inputs: dict[str, str], tmp_path: Path
) -> None:
    # Two CPUs for four workers: without a least number they are waited for.
    train = {**SHORT, "method": {"type": "sft"}, "keep": "last", "micro_batch": 2, "batch_size": 8}
    stage = stage_of(store, inputs, train, {"workers": 4, "min_workers": 1})
    run(stage)
    loop, _ = alone(stage, tmp_path)
    losses = [row["loss"] for row in curve(stage).to_pylist()]
    assert losses == pytest.approx([row["loss"] for row in loop.state.steps], rel=1e-4)


def test_distributions_need_one_tokenizer_and_bfloat16_needs_a_gpu(store: LocalStore, inputs: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"switch compares distributions, but teacher stranger and student student"):
        plan_of(stage_of(store, inputs, {**SHORT, "method": SWITCH}, teacher="stranger"))
    with pytest.raises(ValueError, match="input 'models' names no model 'nobody'; it has student, teacher, stranger"):
        plan_of(stage_of(store, inputs, {**SHORT, "method": SWITCH}, teacher="nobody"))
    with pytest.raises(ValueError, match=r"train.precision: bfloat16 needs GPUs"):
        plan_of(stage_of(store, inputs, {**SHORT, "method": {"type": "sft"}, "precision": "bfloat16"}))


def test_checkpoints_stand_beside_the_parts(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    system, place = storage(store, "stages/train/x")
    assert (system.type_name, place) == ("local", str(store.root / "stages/train/x"))
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    bucket = S3Store("bucket", "prefix")
    bucket.client.create_bucket(Bucket="bucket")
    bucket.write("stages/train/x/manifest.json", b"{}")
    system, place = storage(bucket, "stages/train/x/checkpoints")
    system.create_dir(f"{place}/step")
    with system.open_output_stream(f"{place}/step/state.json") as file:
        file.write(b"{}")
    assert bucket.read("stages/train/x/checkpoints/step/state.json") == b"{}"
    system.delete_dir(place)
    files = [path for path in bucket.list("stages/train/x") if not path.endswith("/")]
    server.stop()
    assert files == ["stages/train/x/manifest.json"]


@pytest.mark.long
def test_a_worker_killed_midway_costs_steps_but_no_result(
    cluster: None, store: LocalStore, inputs: dict[str, str]
) -> None:
    from ray.train import TrainingFailedError

    train = {**SHORT, "method": SWITCH, "steps": 120, "checkpoint_every": 10, "validate_every": 50}
    # The same plan in two folders.
    whole, killed = (stage_of(store, inputs, train, redo=redo) for redo in (0, 1))
    run(whole)
    folder = store.root / killed.spec.folder / "checkpoints"

    def kill() -> None:
        while len(list(folder.glob("checkpoint_*"))) < 2:
            time.sleep(0.02)
        for process in psutil.Process().children(recursive=True):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                process.send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(TrainingFailedError):
        run(killed)
    killer.join()
    # A kill in the middle of a checkpoint leaves half a folder; in the middle of Ray Train's list, half of that.
    half = folder / "checkpoint_9999-cut-off"
    shutil.copytree(max(path for path in folder.glob("checkpoint_*") if path.is_dir()), half)
    (half / "weights.safetensors").write_bytes((half / "weights.safetensors").read_bytes()[:1000])
    (folder / "checkpoint_manager_snapshot.json").write_text('{"ray_version": "2')
    run(killed)
    assert curve(killed).equals(curve(whole))
    assert killed.facts["models"]["student"]["revision"] == whole.facts["models"]["student"]["revision"]
    assert not folder.exists()


@pytest.mark.long
def test_shards_on_two_workers_are_the_whole_on_one(
    cluster: None, store: LocalStore, inputs: dict[str, str], tmp_path: Path
) -> None:
    train = {**SHORT, "method": SWITCH, "keep": "last", "micro_batch": 3, "batch_size": 9}
    stage = stage_of(store, inputs, train, {"workers": 2})
    fit(stage, plan_of(stage).model_copy(update={"sharded": True}))
    with newest(*storage(store, f"{stage.spec.folder}/checkpoints")) as folder:
        assert folder
        committed = load_file(folder / "student" / "model.safetensors")
        rows = pq.read_table(folder / "steps.parquet").to_pylist()
    loop, weights = alone(stage, tmp_path)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in loop.state.steps], rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(committed[name], weight, rtol=0, atol=2e-3, msg=name)


@pytest.mark.long
def test_a_loss_that_is_not_finite_is_one_line(cluster: None, store: LocalStore, inputs: dict[str, str]) -> None:
    train = {**SHORT, "method": {"type": "sft"}, "learning_rate": 1e30, "warmup_steps": 0, "validate_every": 100}
    with pytest.raises(ValueError, match=r"^step 2: loss nan, .* on row-\d+, .*; last good checkpoint: step 0"):
        run(stage_of(store, inputs, train, {"workers": 2}))


def worker_limits(watch: Callable[[int], None], ended: threading.Event) -> threading.Thread:
    """Show every training worker to ``watch``, again and again, until the event is set."""

    def look() -> None:
        while not ended.wait(0.01):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error, ProcessLookupError, FileNotFoundError):
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        watch(process.pid)

    thread = threading.Thread(target=look)
    thread.start()
    return thread


def test_a_worker_out_of_memory_goes_on_with_half_the_sequences(cluster: None, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    student = save_model(store, "student", seed=1, hidden=64)
    row = {"prompt_id": "p", "sample_id": "s", "source": "toy", "prompt_token_ids": [1, 5], "weight": 1.0}
    responses = [[3 + (start + place) % 200 for place in range(100)] for start in range(512)]
    rows = [row | {"row_id": f"row-{number}", "token_ids": ids} for number, ids in enumerate(responses)]
    inputs = commit_inputs(store, {"student": student}, pa.Table.from_pylist(rows, KEPT))
    settings = {"method": {"type": "sft"}, "steps": 2, "batch_size": 512, "validation_share": 0.0}
    held = [0]

    def measure(pid: int) -> None:
        status = Path(f"/proc/{pid}/status").read_text()
        held[0] = max(held[0], *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData")))

    def limit(pid: int) -> None:
        # Room for half of the batch at once, and some more; all of it takes about twice that.
        bytes_ = (held[0] << 10) + (100 << 20)
        resource.prlimit(pid, resource.RLIMIT_DATA, (bytes_, bytes_))

    results = []
    for watch, micro_batch in ((measure, 256), (limit, 512)):
        ended = threading.Event()
        watcher = worker_limits(watch, ended)
        stage = stage_of(store, inputs, {**settings, "micro_batch": micro_batch})
        try:
            run(stage)
        finally:
            ended.set()
            watcher.join()
        results.append(stage)
    small, large = results
    assert "out_of_memory" not in small.facts
    assert large.facts["out_of_memory"]["micro_batch"] == 256
    assert "step 1: out of memory at train.micro_batch 512 on row-" in large.facts["out_of_memory"]["said"]
    assert curve(large).equals(curve(small))


def test_one_sequence_that_does_not_fit_is_one_line(store: LocalStore, inputs: dict[str, str]) -> None:
    plan = plan_of(stage_of(store, inputs, {**SHORT, "method": {"type": "sft"}, "micro_batch": 1}))
    with pytest.raises(ValueError, match=r"^step 3: out of memory.*: set train.gradient_checkpointing"):
        smaller(plan, 1, MemoryError("step 3: out of memory at train.micro_batch 1 on row-7"))
    assert (
        smaller(
            plan_of(stage_of(store, inputs, {**SHORT, "method": {"type": "sft"}, "micro_batch": 8})), 4, MemoryError()
        ).train.micro_batch
        == 1
    )

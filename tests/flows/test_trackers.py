"""Trackers and the endpoint for Prometheus: what the settings refuse, and what arrives of a run's own lines."""

import json
import logging
import socket
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tiny
from pydantic import ValidationError

from flows.trackers import Following, usable
from infra.cluster import free_port
from infra.manifest import Manifest, load_manifest
from infra.store import LocalStore
from tasks import schemas
from tasks.config import RunConfig
from tasks.config.trackers import Trackers
from tasks.stage import MARK, Stage, StageSpec

LOSSES = [2.5, 2.0, 1.5, 1.25]
CHARGED = {"queries": 12, "prompt_tokens": 240, "completion_tokens": 96, "money": 0.25, "currency": "USD"}


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[dict[str, Any]]]:
    """Progress that stages printed since the last look, as the flow reads it."""

    def read() -> list[dict[str, Any]]:
        return [json.loads(line[len(MARK) :]) for line in capsys.readouterr().out.splitlines() if line.startswith(MARK)]

    return read


def stage_of(store: LocalStore, name: str) -> Stage[Any]:
    return Stage(StageSpec(stage=name, module="m", root=store.uri), RunConfig.model_construct())


def manifest_of(stage: Stage[Any]) -> Manifest:
    from infra.manifest import commit_manifest

    commit_manifest(stage.store, stage.manifest)
    return load_manifest(stage.store, stage.spec.manifest_path)


def follow(tmp_path: Path, lines: Callable[[], list[dict[str, Any]]], **trackers: Any) -> Iterator[None]:
    """A run in small, told as its stages tell it; pauses before its end."""
    store = LocalStore(tmp_path / "root")
    config = RunConfig.model_validate({**tiny.settings(tmp_path), "trackers": trackers})
    following = Following(config, "tiny-1", store, logging.getLogger("trackers"))

    annotate = stage_of(store, "annotate")
    following.started("annotate")
    annotate.progress(12, 12, "prompts", tokens=96, tokens_per_second=48.0, left="12 queries", charged=CHARGED)
    for event in lines():
        following.progress("annotate", event)
    following.finished("annotate", manifest_of(annotate))

    train = stage_of(store, "train")
    following.started("train")
    rows = [dict.fromkeys(schemas.STEP.names, None) | {"step": n, "loss": loss} for n, loss in enumerate(LOSSES, 1)]
    # Steps come faster than they are shown: the second and third are known from the curve alone.
    for number in (1, 4):
        train.progress(number, 4, "steps", last=True, tokens_per_second=64.0, loss=LOSSES[number - 1])
    for event in lines():
        following.progress("train", event)
    train.write_table("steps", pa.Table.from_pylist([{**row, "gradient_norm": 0.5} for row in rows], schemas.STEP))
    following.finished("train", manifest_of(train))

    report = stage_of(store, "report")
    values = {"loss": 1.2, "loss_ci": [1.1, 1.3], "rouge_l": None, "rouge_l_ci": None, "accuracy": 0.5}
    report.facts.update(metrics={"final": values, "teacher": None}, report="r/index.html", verdict="It learned.")
    following.started("report")
    following.finished("report", manifest_of(report))
    yield
    following.close("Completed")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mlflow": "http://me:secret@mlflow:5000"}, "MLFLOW_TRACKING_PASSWORD"),
        ({"mlflow": "mlruns"}, "should match"),
        ({"wandb": "a/b/c"}, "should match"),
        ({"tensorboard": "s3://bucket/runs"}, "should match"),
        ({"prometheus": {"host": "0.0.0.0"}}, "is not loopback"),
        ({"prometheus": {"port": 0}}, "greater than or equal to 1"),
    ],
)
def test_mistakes_are_told(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Trackers.model_validate(given)


def test_what_cannot_be_used_is_a_line_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import preflight, trackers

    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "wandb" else name)
    chosen = Trackers(wandb="project", tensorboard="runs/board")
    (line,) = usable(chosen)
    assert line.startswith("trackers.wandb: the package wandb is missing: pip install 'switchyard[wandb]'")
    data = tiny.settings(Path("/nowhere"))
    found = preflight.readable(RunConfig.model_validate({**data, "trackers": {"wandb": "p"}}), "/tmp")
    assert found["trackers can be used"] == [line]


def test_an_endpoint_that_cannot_be_had_is_a_line_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        (line,) = usable(Trackers.model_validate({"prometheus": {"port": taken.getsockname()[1]}}))
    assert line.startswith("trackers.prometheus.port: 127.0.0.1:")
    assert "Address already in use" in line
    monkeypatch.delenv("SCRAPE_TOKEN", raising=False)
    (line,) = usable(Trackers.model_validate({"prometheus": {"host": "0.0.0.0", "token_variable": "SCRAPE_TOKEN"}}))
    assert "SCRAPE_TOKEN is not set" in line


def scrape(port: int, token: str = "") -> dict[str, float]:
    """Samples by name and labels, as Prometheus would read them."""
    from prometheus_client.parser import text_string_to_metric_families as families

    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=10) as reply:
        text = reply.read().decode()
    found = {}
    for sample in (sample for family in families(text) for sample in family.samples):
        labels = {name: value for name, value in sample.labels.items() if name != "run"}
        assert sample.labels["run"] == "tiny-1"
        found[" ".join([sample.name.removeprefix("switchyard_"), *labels.values()])] = sample.value
    return found


def test_prometheus_reads_how_a_run_stands(
    tmp_path: Path, lines: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRAPE_TOKEN", "open-sesame")
    port = free_port()
    run = follow(tmp_path, lines, prometheus={"port": port, "token_variable": "SCRAPE_TOKEN"})
    next(run)
    found = waited(port, "open-sesame")
    wanted = {
        "stage_running annotate": 0,
        "stage_running train": 0,
        "stage_running report": 1,
        "stage_done annotate": 12,
        "stage_total annotate": 12,
        "stage_tokens annotate": 96,
        "stage_tokens_per_second annotate": 48,
        "teacher_queries": 12,
        "teacher_completion_tokens": 96,
        "teacher_money": 0.25,
        "stage_loss train": 1.25,
        "stage_tokens_per_second train": 64,
        "stage_rows train": 4,
        "heldout loss final": 1.2,
        "heldout loss_high final": 1.3,
    }
    assert {name: found[name] for name in wanted} == wanted
    with pytest.raises(urllib.error.HTTPError, match="401"):
        scrape(port, "guess")
    assert next(run, None) is None
    with pytest.raises(urllib.error.URLError):
        scrape(port, "open-sesame")


def waited(port: int, token: str = "") -> dict[str, float]:
    """What is there once the thread has handed on all that was told."""
    deadline = time.monotonic() + 60
    while True:
        try:
            if "heldout accuracy final" in (found := scrape(port, token)):
                return found
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.1)


def events(folder: Path) -> Iterator[Any]:
    """Events of TensorBoard's files: records of a length, its checksum, data, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = folder.glob("tiny-1-*/events.out.tfevents.*")
    data = file.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_tensorboard_has_the_whole_curve_once(tmp_path: Path, lines: Callable[[], list[dict[str, Any]]]) -> None:
    list(follow(tmp_path, lines, tensorboard=str(tmp_path / "board")))
    found: dict[str, dict[int, float]] = {}
    texts = {}
    for event in events(tmp_path / "board"):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                assert event.step not in found.setdefault(value.tag, {})
                found[value.tag][event.step] = value.simple_value
            else:
                texts[value.tag.removesuffix("/text_summary")] = value.tensor.string_val[0].decode()
    assert found["train/loss"] == dict(enumerate(LOSSES, 1))
    assert found["train/gradient_norm"] == dict.fromkeys((1, 2, 3, 4), 0.5)
    assert found["annotate/teacher_queries"] == {12: 12}
    assert found["heldout/final/accuracy"] == {0: 0.5}
    assert texts["report"] == str(tmp_path / "root/r/index.html")
    assert texts["state"] == "Completed"
    assert '"name": "tiny"' in texts["settings"]


@pytest.mark.long
def test_mlflow_has_the_whole_curve(tmp_path: Path, lines: Callable[[], list[dict[str, Any]]]) -> None:
    mlflow = pytest.importorskip("mlflow")
    address = f"sqlite:///{tmp_path}/mlflow.db"
    list(follow(tmp_path, lines, mlflow=address))
    client = mlflow.MlflowClient(tracking_uri=address)
    (run,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    curve = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "train/loss")}
    assert curve == dict(enumerate(LOSSES, 1))
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 4
    assert run.data.metrics["heldout/final/accuracy"] == 0.5
    assert run.data.metrics["annotate/teacher_money"] == 0.25
    assert run.data.params["train.steps"] == "3"
    assert run.data.tags["switchyard.report"] == str(tmp_path / "root/r/index.html")
    assert (run.info.run_name, run.info.status) == ("tiny-1", "FINISHED")


def written_down(data: bytes) -> Iterator[bytes]:
    """Records of an offline run: LevelDB's log after a head of 7 bytes, records cut at blocks of 32 KiB."""
    position, record = 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += 7 + length
        record += data[position - length : position]
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


@pytest.mark.long
def test_wandb_without_a_key_is_written_down(
    tmp_path: Path, lines: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "root").mkdir()
    list(follow(tmp_path, lines, wandb="distillation"))
    (file,) = tmp_path.glob("root/wandb/offline-run-*/run-*.wandb")
    curve, summary = {}, {}
    for data in written_down(file.read_bytes()):
        record = Record.FromString(data)
        row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        if "train/loss" in row:
            curve[row["train/step"]] = row["train/loss"]
        summary |= {
            ".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.summary.update
        }
    assert curve == dict(enumerate(LOSSES, 1))
    assert summary["report"] == str(tmp_path / "root/r/index.html")


def test_a_tracker_that_fails_is_left_out(
    tmp_path: Path,
    lines: Callable[[], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A full disk, say: the other tracker gets all, and the run hears one warning."""
    from flows.tracked import TensorBoardRun

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(TensorBoardRun, "rows", full)
    port = free_port()
    run = follow(tmp_path, lines, tensorboard=str(tmp_path / "board"), prometheus={"port": port})
    next(run)
    waited(port)
    list(run)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "trackers.tensorboard: left out from now on: OSError: No space left on device"
    ]

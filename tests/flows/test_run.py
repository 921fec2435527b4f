"""A whole run with every real part (Prefect, Ray, vLLM, Ray Train) on a tiny model: once through, again, and killed."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import tiny
from served import KEY, NAME, vllm_server
from witness import PLANTED, Witness

ROOT = Path(__file__).parent.parent.parent
SECONDS = 1800
COMMAND = [sys.executable, "-m", "flows.cli"]


def start(
    config: Path, root: Path | str, *options: str, said: Path | None = None, **variables: str
) -> subprocess.Popen[str]:
    """``said``: where to put what it tells a person; absent: to this process's stderr."""
    command = [*COMMAND, "run", str(config), "--root", str(root), "--json", *options]
    environment = {**os.environ, **variables, "SWITCHYARD_HOME": str(config.parent / "home")}
    # Where these tests run in the background, Ctrl-C is ignored, and children would inherit that.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with said.open("w") if said else nullcontext() as stderr:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": stderr}
        return subprocess.Popen(command, cwd=ROOT, text=True, env=environment, preexec_fn=heed, **pipes)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, _ = process.communicate(timeout=SECONDS)
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert process.returncode == 0, result
    return result


def wait_for_stage(root: Path, stage: str, pattern: str, count: int = 1) -> None:
    """Return when so many files of the stage's outputs are there."""
    deadline = time.monotonic() + SECONDS
    while len(list(root.glob(f"stages/{stage}/*/{pattern}"))) < count:
        assert time.monotonic() < deadline, f"{stage} did not start"
        time.sleep(0.1)


def processes_of(root: Path) -> list[str]:
    """Command lines of everything that still works for a run on this root."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(root) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def ids(root: Path, stage: str, table: str, column: str, fingerprint: str = "*") -> list[str]:
    import duckdb

    paths = f"{root}/stages/{stage}/{fingerprint}/{table}/*.parquet"
    return [row[0] for row in duckdb.sql(f"SELECT {column} FROM '{paths}' ORDER BY 1").fetchall()]  # noqa: S608


def fingerprints(result: dict[str, Any]) -> dict[str, str]:
    return {stage["name"]: stage["fingerprint"] for stage in result["stages"]}


def kill(process: subprocess.Popen[str], root: Path) -> None:
    """``kill -9`` of the flow; returns when nothing of the run is left."""
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while processes_of(root):
        assert time.monotonic() < deadline, processes_of(root)
        time.sleep(0.2)


class Finished:
    def __init__(self, config: Path, root: Path, result: dict[str, Any], witness: Witness, said: str) -> None:
        self.config, self.root, self.result, self.witness, self.said = config, root, result, witness, said


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("run")
    config = tiny.write_config(folder)
    with Witness(folder / "root") as witness:
        result = finish(start(config, folder / "root", said=folder / "said.txt", **PLANTED))
    return Finished(config, folder / "root", result, witness, (folder / "said.txt").read_text() + json.dumps(result))


def test_no_secret_is_to_be_seen(finished: Finished) -> None:
    """Neither the planted ones nor Ray's own, in nothing that the run left, logged, told or was started with."""
    witness = finished.witness
    assert witness.leaks(finished.root, finished.config.parent / "home", said=finished.said) == []
    # It looked where there was something to be seen.
    assert len(witness.secrets) > 2 * len(set(PLANTED.values()))
    assert any(command.endswith("spec.json") for command in witness.commands)
    assert any(file.name == "gcs_server.out" for file in witness.logs)
    assert {".parquet", ".json", ".html", ".db", ".log", ".safetensors"} <= {p.suffix for p in finished.root.rglob("*")}
    witness.secrets = {finished.result["run"]}
    seen = " ".join(witness.leaks(finished.root, said=finished.said))
    assert all(place in seen for place in ("the process list", "what it said", "run.json", "prefect.db"))


@pytest.mark.timeout(SECONDS)
def test_the_result_says_what_a_program_needs(finished: Finished) -> None:
    result = finished.result
    assert result["state"] == "Completed"
    assert [stage["name"] for stage in result["stages"]][-1] == "report"
    assert not any(stage["reused"] for stage in result["stages"])
    assert set(result["metrics"]) == {"base", "warmup", "final", "teacher"}
    for metrics in result["metrics"].values():
        for name in ("loss", "rouge_l", "accuracy"):
            low, high = metrics[f"{name}_ci"]
            assert low <= metrics[name] <= high
    page = Path(result["report"]).read_text()
    assert "<script" not in page
    assert "http-equiv" in page


def test_the_budget_is_what_was_asked(finished: Finished) -> None:
    asked = [len(ids(finished.root, stage, "samples", "sample_id")) for stage in ("warmup-annotate", "annotate")]
    assert asked == [12, 12]
    assert len(ids(finished.root, "student-sample", "samples", "sample_id")) == 20 * 3
    prompts = [ids(finished.root, stage, "samples", "prompt_id") for stage in ("warmup-annotate", "annotate")]
    assert not set(prompts[0]) & set(prompts[1])


def test_parquet_is_read_by_others(finished: Finished) -> None:
    import pyarrow.dataset
    from datasets import load_dataset

    files = [str(path) for path in finished.root.glob("stages/keep/*/scores/*.parquet")]
    assert pyarrow.dataset.dataset(files).count_rows() == 12
    data = load_dataset("parquet", data_files=files, split="train", cache_dir=str(finished.root.parent / "cache"))
    assert data.num_rows == 12
    assert set(ids(finished.root, "keep", "scores", "reason")) <= {"kept", "below_threshold", "empty"}


@pytest.mark.timeout(SECONDS)
def test_transformers_and_vllm_load_the_student(finished: Finished) -> None:
    student = finished.result["student"]
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in Path(student).iterdir()
    }
    script = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained({student!r}), AutoTokenizer.from_pretrained({student!r})
assert tokenizer.chat_template and model.config.num_hidden_layers == 1
from vllm import LLM, SamplingParams
llm = LLM({student!r}, dtype="float32", enforce_eager=True, max_model_len=128, kv_cache_memory_bytes=1 << 24)
print("TEXT", llm.generate("1 + 1 =", SamplingParams(max_tokens=4, temperature=0))[0].outputs[0].token_ids)
"""
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS)
    assert "TEXT [" in output.stdout, output.stderr[-2000:]


@pytest.mark.long
@pytest.mark.timeout(SECONDS)
def test_vllms_server_answers_with_the_student(finished: Finished, tmp_path: Path) -> None:
    body = {"model": NAME, "max_tokens": 4, "messages": [{"role": "user", "content": "What is 1 + 1?"}]}
    headers = {"Authorization": f"Bearer {KEY}"}
    with vllm_server(Path(finished.result["student"]), tmp_path / "server.log") as address:
        reply = httpx.post(f"{address}/chat/completions", json=body, headers=headers, timeout=120)
    reply.raise_for_status()
    assert 1 <= reply.json()["usage"]["completion_tokens"] <= 4


@pytest.mark.timeout(SECONDS)
def test_a_second_run_reuses_every_stage_and_starts_no_ray(finished: Finished) -> None:
    began = {path.name for path in Path("/tmp").glob("switchyard-ray-*")}
    again = finish(start(finished.config, finished.root))
    assert all(stage["reused"] for stage in again["stages"])
    assert again["metrics"] == finished.result["metrics"]
    assert {path.name for path in Path("/tmp").glob("switchyard-ray-*")} <= began


def test_engines_and_training_models_agreed(finished: Finished) -> None:
    (manifest,) = finished.root.glob("stages/train/*/manifest.json")
    parity = json.loads(manifest.read_text())["facts"]["parity"]
    assert set(parity) == {"teacher", "student"}
    assert all(found["tokens"] > 0 and found["largest"] < 1e-3 for found in parity.values())


def test_distributions_of_the_teacher_were_kept(finished: Finished) -> None:
    kept = ids(finished.root, "keep", "kept", "distributions")
    assert kept
    assert all(kept)


def test_a_training_row_is_traced_to_its_prompt(finished: Finished) -> None:
    row = ids(finished.root, "keep", "kept", "row_id")[0]
    command = [*COMMAND, "trace", row, "--run", "tiny", "--root", str(finished.root)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout)
    assert found["prompt"]["prompt_id"] == found["training row"]["prompt_id"]
    assert len(found["student's answers"]) == 3
    assert found["teacher's answer"]["sample_id"] == row


def test_runs_are_compared_and_signals_weighed(finished: Finished, tmp_path: Path) -> None:
    page = tmp_path / "runs.html"
    options = ["--root", str(finished.root), "--json"]
    compare = [*COMMAND, "compare", "tiny", "tiny", "--html", str(page), *options]
    rows = json.loads(subprocess.run(compare, capture_output=True, text=True, cwd=ROOT, check=True).stdout)
    assert [row["queries"] for row in rows] == [24, 24]
    assert rows[0]["loss"] == finished.result["metrics"]["final"]["loss"]
    gain = rows[0]["loss"] - finished.result["metrics"]["base"]["loss"]
    assert rows[0]["loss_per_1000_queries"] == pytest.approx(gain * 1000 / 24, rel=0.01)
    assert rows[0]["loss_per_money"] == pytest.approx(gain / rows[0]["money"], rel=0.01)
    assert rows[0]["loss_per_device_hour"] == pytest.approx(gain / rows[0]["device_hours"], rel=0.05)
    assert "runs side by side" in page.read_text()

    weigh = [*COMMAND, "signals", "tiny", *options]
    ways = json.loads(subprocess.run(weigh, capture_output=True, text=True, cwd=ROOT, check=True).stdout)
    by_way = {way["signal"]: way for way in ways}
    assert by_way["both"]["shared"] == by_way["both"]["queries"] == 12
    assert all(way["queries"] == 12 and way["teacher_tokens"] > 0 for way in ways)
    assert by_way["oracle"]["known_wrong"] == max(way["known_wrong"] for way in ways)


def test_show_tells_the_run(finished: Finished) -> None:
    command = [*COMMAND, "show", "tiny", "--root", str(finished.root), "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert json.loads(shown.stdout.splitlines()[-1])["run"] == finished.result["run"]
    assert "queries" in shown.stderr
    assert "teacher budget" in shown.stderr


def test_every_query_is_charged_once(finished: Finished) -> None:
    (manifest,) = finished.root.glob("stages/annotate/*/manifest.json")
    facts = json.loads(manifest.read_text())["facts"]
    assert facts["charged"]["queries"] == facts["spent"]["queries"] == 12
    assert facts["charged_in_all"]["queries"] == 24
    assert facts["charged"]["prompt_tokens"] == facts["prompt_tokens"]
    assert facts["charged"]["completion_tokens"] == facts["completion_tokens"]
    assert set(ids(finished.root, "annotate", "queries", "reason")) == {"answered"}


@pytest.mark.timeout(3 * SECONDS)
def test_an_interrupted_and_killed_redo_continues_to_the_same_rows(finished: Finished) -> None:
    root = finished.root
    # Training will meet a part that is not as it was committed: keep makes it anew, and the run goes on.
    # It is damaged before the redo, for a training that continues from its last step reads no rows.
    (part,) = root.glob("stages/keep/*/kept/part-00000-*.parquet")
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    interrupted = start(finished.config, root, "--from", "train")
    # The finished stage has no checkpoints left, so these are the redone one's.
    wait_for_stage(root, "train", "checkpoints/checkpoint*")
    interrupted.send_signal(signal.SIGINT)
    interrupted.wait(timeout=120)
    assert interrupted.returncode == 130
    assert processes_of(root) == []

    killed = start(finished.config, root)
    deadline = time.monotonic() + SECONDS
    while len(list(root.glob("stages/evaluate-after/*/spec.json"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    kill(killed, root)

    result = finish(start(finished.config, root))
    again = {stage["name"] for stage in result["stages"] if not stage["reused"]}
    assert again == {"evaluate-after", "report"}
    verified = subprocess.run([*COMMAND, "verify", "tiny", "--root", str(root)], cwd=ROOT)
    assert verified.returncode == 0
    before, after = fingerprints(finished.result), fingerprints(result)
    assert {name for name in before if before[name] != after[name]} == {"train", "evaluate-after", "report"}
    for stage, table, column in (("train", "steps", "step"), ("evaluate-after", "evaluations", "prompt_id")):
        assert ids(root, stage, table, column, after[stage]) == ids(root, stage, table, column, before[stage])


@pytest.mark.long
@pytest.mark.timeout(SECONDS)
def test_a_deep_plan_compares_engines_with_training_models(finished: Finished) -> None:
    command = [*COMMAND, "plan", str(finished.config), "--root", str(finished.root), "--deep", "--json"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=SECONDS)
    assert found.returncode == 0, found.stderr[-2000:]
    parity = json.loads(found.stdout.splitlines()[-1])["parity"]
    assert all(parity[role]["largest"] < 1e-3 for role in ("teacher", "student"))
    strict = subprocess.run(
        [*command, "--set", "train.parity.float32={mean: 1.0e-12, largest: 1.0e-12}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=SECONDS,
    )
    assert strict.returncode == 2
    assert "train.parity" in strict.stderr.splitlines()[-1]
    assert "Traceback" not in strict.stderr


@pytest.mark.long
@pytest.mark.timeout(3 * SECONDS)
def test_a_run_killed_in_every_stage_continues_to_the_same_rows(finished: Finished, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for stage in fingerprints(finished.result):
        killed = start(finished.config, root)
        wait_for_stage(root, stage, "spec.json")
        time.sleep(1)
        kill(killed, root)
    result = finish(start(finished.config, root))
    made = fingerprints(finished.result)
    assert fingerprints(result) == made
    for name, table, column in (
        ("warmup-annotate", "samples", "sample_id"),
        ("student-sample", "samples", "sample_id"),
        ("annotate", "samples", "prompt_id"),
        ("keep", "scores", "prompt_id"),
        ("train", "steps", "step"),
        ("evaluate-after", "evaluations", "prompt_id"),
    ):
        # Another test may have redone stages beside the first ones.
        assert ids(root, name, table, column) == ids(finished.root, name, table, column, made[name]), name

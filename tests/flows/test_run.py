"""A whole run with every real part (Prefect, Ray, vLLM, Ray Train) on a tiny model: once through, and again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from served import KEY, NAME, vllm_server
from whole import COMMAND, ROOT, SECONDS, Finished, finish, ids, start
from witness import PLANTED


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
    *ways, after = json.loads(subprocess.run(weigh, capture_output=True, text=True, cwd=ROOT, check=True).stdout)
    by_way = {way["signal"]: way for way in ways}
    assert by_way["both"]["shared"] == by_way["both"]["prompts"] == 12
    assert all(way["queries"] == 12 and way["teacher_tokens"] > 0 for way in ways)
    reasons = [why for stage in ("warmup-keep", "keep") for why in ids(finished.root, stage, "scores", "reason")]
    assert after["queries"] == reasons.count("below_threshold")
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

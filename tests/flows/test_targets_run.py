"""Whole runs: annotations that have to agree with the TA, stand-ins and auxiliary targets; and one stage alone."""

import json
import subprocess
from pathlib import Path
from typing import Any

import duckdb
import pytest
import tiny
import yaml
from whole import COMMAND, ROOT, finish, start

HERE = Path(__file__).parent


def facts(root: Path, stage: str) -> dict[str, Any]:
    (manifest,) = root.glob(f"stages/{stage}/*/manifest.json")
    return json.loads(manifest.read_text())["facts"]


def rows(root: Path, stage: str, table: str) -> list[dict[str, Any]]:
    found = duckdb.sql(f"SELECT * FROM '{root}/stages/{stage}/*/{table}/*.parquet'")  # noqa: S608
    return [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_run_with_agreement_stand_ins_and_auxiliary_targets(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "teacher", seed=1)
    data, root = tiny.settings(tmp_path), tmp_path / "root"
    data["prompts"]["verifier"] = "parity_verifier:check"
    data["signals"]["keep"] = {"rule": "all", "drop_truncated": False, "agreement": {"max_tokens": 12}}
    data["signals"]["keep"]["stand_in"] = {"margin": 1e-4}
    data["auxiliary"] = {"template": "Facts of: {question}", "weight": 0.5, "max_tokens": 6}
    # Enough prompts that some student's text is trusted more: which ones is up to noise.
    data["budget"] |= {"queries": 120, "warmup_share": 0.2}
    data["signals"]["candidates"] = 60
    data["prompts"]["sources"][0]["tasks"][0]["size"] = 100
    data["train"]["method"]["annotated"] = "live"
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
    result = finish(start(tmp_path / "tiny.yaml", root, PYTHONPATH=str(HERE)))
    assert result["state"] == "Completed"

    # Half of the queries are for answers, and not one more than the budget has is charged.
    charged = [facts(root, name)["charged"]["queries"] for name in ("warmup-annotate", "warmup-auxiliary")]
    charged += [facts(root, name)["charged"]["queries"] for name in ("annotate", "auxiliary")]
    assert charged == [12, 12, 48, 48]
    assert facts(root, "auxiliary")["charged_in_all"]["queries"] == 120
    assert facts(root, "report")["quality_for_cost"]["per_1000_queries"]["took"] == 120

    scores = rows(root, "keep", "scores")
    finals = {row["prompt_id"]: row["final_answer"] for row in rows(root, "keep", "assistant_answers")}
    reasons = facts(root, "keep")["reasons"]
    assert len(finals) == 48
    assert reasons["disagreement"] > 0
    for row in scores:
        agrees = row["final_answer"] == finals[row["prompt_id"]]
        assert agrees == (row["reason"] in ("kept", "replaced", "stand_in")) or row["reason"] == "empty"
    kept = {row["row_id"]: row for row in rows(root, "keep", "kept")}
    own = [row["sample_id"] for row in scores if row["reason"] == "stand_in"]
    students = {row["sample_id"]: row for row in rows(root, "student-sample", "samples")}
    assert own
    assert facts(root, "keep")["stand_ins"] == len(own)
    assert all(kept[name]["token_ids"] == students[name]["token_ids"] for name in own)
    assert f"{len(own)} of them the student" in Path(result["report"]).read_text()

    targets = rows(root, "auxiliary", "kept")
    asked = {row["prompt_id"] for row in rows(root, "annotate", "samples")}
    assert {row["prompt_id"] for row in rows(root, "auxiliary", "samples")} == asked
    assert {row["weight"] for row in targets} == {0.5}
    seen = facts(root, "train")["data"]
    everything = sum(len(rows(root, name, "kept")) for name in ("warmup-keep", "keep", "warmup-auxiliary", "auxiliary"))
    assert seen["rows"] + seen["validation_rows"] + seen["auxiliary_of_validation"] == everything

    def trace(row: str) -> dict[str, Any]:
        command = [*COMMAND, "trace", row, "--run", "tiny", "--root", str(root)]
        return json.loads(subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout)

    found = trace(own[0])
    assert found["student's answer that stands in"]["sample_id"] == own[0]
    assert {row["reason"] for row in found["other annotations"]} <= {"replaced", "disagreement"}
    assert trace(targets[0]["row_id"])["teacher's auxiliary target"]["sample_id"] == targets[0]["row_id"]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_run_of_one_stage(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "teacher", seed=1)
    data, root = tiny.settings(tmp_path), tmp_path / "root"
    data["budget"]["warmup_share"], data["signals"]["candidates"] = 0, 40
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
    result = finish(start(tmp_path / "tiny.yaml", root))
    assert (result["state"], list(result["metrics"])) == ("Completed", ["base", "final", "teacher"])
    assert not list(root.glob("stages/warmup-*"))
    assert facts(root, "prompts")["counts"]["warmup"] == 0
    assert facts(root, "annotate")["charged_in_all"]["queries"] == 24
    # Its signals are the base student's.
    (base,) = {row["revision"] for row in rows(root, "student-sample", "samples")}
    assert base == facts(root, "models")["models"]["student"]["revision"]
    assert facts(root, "train")["steps"] == 3
    assert "Stage 1" not in Path(result["report"]).read_text()
    assert "The method: one stage." in (Path(result["student"]) / "README.md").read_text()

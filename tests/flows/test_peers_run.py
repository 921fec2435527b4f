"""A whole run with two teachers that review each other, and a mentor, on tiny models."""

import json
from pathlib import Path
from typing import Any

import duckdb
import pytest
import tiny
import yaml
from whole import finish, ids, start

# Between what these two random models give each other's answers: all of one are kept, none of the other's.
THRESHOLD = 0.75


def rows(root: Path, stage: str, table: str) -> list[dict[str, Any]]:
    return duckdb.sql(f"FROM '{root}/stages/{stage}/*/{table}/*.parquet'").to_arrow_table().to_pylist()


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_teachers_review_each_other_and_a_mentor_goes_on(tmp_path: Path) -> None:
    for seed, name in enumerate(("teacher", "coder"), 1):
        tiny.save_model(tmp_path / name, seed=seed)
    data, root = tiny.settings(tmp_path), tmp_path / "root"
    del data["sampling"]["distributions"]
    data["train"]["method"]["annotated"] = "live"
    data["signals"]["keep"] = {"rule": "all", "drop_truncated": False}
    coder = {"name": "coder", "model": {"type": "huggingface", "id": str(tmp_path / "coder")}}
    data["peers"] = {"teachers": [coder], "review": {"threshold": THRESHOLD}}
    data["mentor"] = {"model": data["models"]["teacher"], "train": dict(data["warmup"]), "prompts": 5}
    data["mentor"] |= {"sampling": {"max_tokens": 12}, "distributions": {"type": "top", "limit": 20}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
    result = finish(start(tmp_path / "tiny.yaml", root))
    assert result["state"] == "Completed"

    # The budget is that of all teachers together; nobody was charged for reviews, and nothing for the mentor.
    asked = {name: rows(root, name, "queries") for name in ("annotate", "annotate-coder")}
    asked |= {f"warmup-{name}": rows(root, f"warmup-{name}", "queries") for name in ("annotate", "annotate-coder")}
    assert [sum(row["queries"] for row in table) for table in asked.values()] == [6, 6, 6, 6]
    assert {row["prompt_id"] for row in asked["annotate"]} == {row["prompt_id"] for row in asked["annotate-coder"]}

    for prefix in ("warmup-", ""):
        given = [*rows(root, f"{prefix}review", "reviews-teacher"), *rows(root, f"{prefix}review", "reviews-coder")]
        assert {(row["teacher"], row["reviewer"]) for row in given} == {("teacher", "coder"), ("coder", "teacher")}
        score = {row["sample_id"]: row["score"] for row in given}
        found = {row["sample_id"]: row["reason"] for row in rows(root, f"{prefix}keep", "scores")}
        assert found.keys() == score.keys()
        assert found == {name: "kept" if score[name] >= THRESHOLD else "peer_review" for name in found}, (prefix, score)
        assert set(found.values()) == {"kept", "peer_review"}

    # The mentor wrote on prompts that the teachers were not asked about, with its distributions, and these were learnt.
    written = rows(root, "mentor-annotate", "samples")
    assert {row["role"] for row in written} == {"mentor"}
    assert len(written) == 5
    assert not {row["prompt_id"] for row in written} & {row["prompt_id"] for table in asked.values() for row in table}
    kept = rows(root, "mentor-keep", "kept")
    assert len(kept) == 5
    assert all(row["distributions"] for row in kept)
    assert ids(root, "mentor-keep", "charged", "prompt_id") == []
    manifest = json.loads(next(root.glob("stages/train/*/manifest.json")).read_text())
    assert manifest["facts"]["data"]["soft_rows"] == 5
    page = Path(result["report"]).read_text()
    for said in ("teacher 12, coder 12", "dropped by peer review", "of 5, which cost no teacher query"):
        assert said in page

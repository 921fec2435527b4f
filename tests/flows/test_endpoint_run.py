"""A whole run whose teacher is vLLM's own OpenAI server on a tiny model."""

import json
import subprocess
from pathlib import Path

import pytest
import served
import tiny
import yaml
from test_run import COMMAND, ROOT, finish, ids, start

KEY_VARIABLE = "SWITCHYARD_TEST_KEY"


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_run_with_a_teacher_behind_an_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save_model(tmp_path / "teacher", seed=1)
    monkeypatch.setenv(KEY_VARIABLE, served.KEY)
    data, root = tiny.settings(tmp_path), tmp_path / "root"
    data["train"]["method"] = {"type": "seqkd"}
    data["evaluate"]["reference"] = "source"
    data["budget"] |= {"tokens": 1800, "approve_above": {"queries": 10}}
    del data["sampling"]["distributions"]
    with (
        served.vllm_server(tmp_path / "teacher", tmp_path / "vllm.log") as target,
        served.faulty(target) as (url, proxy),
    ):
        source = {"type": "openai", "model": served.NAME, "base_url": url, "key_variable": KEY_VARIABLE}
        data["models"]["teacher"] = source
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
        result = finish(start(tmp_path / "tiny.yaml", root, "--yes"))
    assert result["state"] == "Completed"
    assert result["metrics"]["teacher"]["loss"] is None
    assert result["metrics"]["final"]["loss"] is not None
    answered = len(ids(root, "warmup-annotate", "samples", "sample_id")) + len(
        ids(root, "annotate", "samples", "sample_id")
    )
    # Nothing but annotation asked the endpoint, and no more than the budget has tokens for.
    assert proxy.billed[0] == answered < 24
    assert sum(proxy.billed[1:]) <= 1800
    assert "budget_exhausted" in ids(root, "annotate", "queries", "reason")
    for path in root.rglob("*"):
        assert not path.is_file() or served.KEY.encode() not in path.read_bytes(), path
    shown = subprocess.run(
        [*COMMAND, "show", "tiny", "--root", str(root), "--json"], capture_output=True, text=True, cwd=ROOT
    )
    assert json.loads(shown.stdout.splitlines()[-1])["state"] == "Completed"
    assert "teacher budget" in shown.stderr

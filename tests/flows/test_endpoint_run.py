"""Whole runs whose teacher is vLLM's own OpenAI server on a tiny model, and what is to be seen of its key."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import served
import tiny
import yaml
from whole import COMMAND, ROOT, SECONDS, finish, ids, start
from witness import PLANTED, Witness

KEY_VARIABLE = "SWITCHYARD_TEST_KEY"
GIVEN = {**PLANTED, KEY_VARIABLE: served.KEY}
Endpoint = tuple[str, served.Proxy]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("endpoint")
    tiny.save_model(folder / "teacher", seed=1)
    with served.vllm_server(folder / "teacher", folder / "vllm.log") as target, served.faulty(target) as found:
        yield found


def settings(folder: Path, url: str) -> Path:
    """Settings of a run that asks the endpoint, below ``folder``; returns their file."""
    tiny.save_model(folder / "teacher", seed=1)
    data = tiny.settings(folder)
    data["models"]["teacher"] = {"type": "openai", "model": served.NAME, "base_url": url, "key_variable": KEY_VARIABLE}
    data["train"]["method"] = {"type": "seqkd"}
    data["evaluate"]["reference"] = "source"
    data["budget"] |= {"tokens": 1800, "approve_above": {"queries": 10}}
    del data["sampling"]["distributions"]
    # As without this section, but for answers of tiny models, which never end: prompts are drawn at random.
    data["signals"] = {"use": "none", "keep": {"drop_truncated": False}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(data))
    return folder / "tiny.yaml"


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_run_with_a_teacher_behind_an_endpoint(endpoint: Endpoint, tmp_path: Path) -> None:
    (url, proxy), root = endpoint, tmp_path / "root"
    proxy.reset()
    with Witness(root, served.KEY) as witness:
        result = finish(start(settings(tmp_path, url), root, "--yes", said=tmp_path / "said.txt", **GIVEN))
    assert result["state"] == "Completed"
    assert result["metrics"]["teacher"]["loss"] is None
    # The source has no written references: no loss, but accuracy.
    assert result["metrics"]["final"]["loss"] is None
    assert result["metrics"]["final"]["accuracy"] is not None
    answered = len(ids(root, "warmup-annotate", "samples", "sample_id")) + len(
        ids(root, "annotate", "samples", "sample_id")
    )
    # Nothing but annotation asked the endpoint, and no more than the budget has tokens for.
    assert proxy.billed[0] == answered < 24
    assert sum(proxy.billed[1:]) <= 1800
    assert "budget_exhausted" in ids(root, "annotate", "queries", "reason")
    # Whoever is sampled is asked about, and nothing that was answered is dropped.
    sampled, selected = (
        ids(root, "student-sample", "samples", "prompt_id"),
        ids(root, "select", "selected", "prompt_id"),
    )
    assert set(sampled) == set(selected)
    assert set(ids(root, "keep", "scores", "reason")) == {"kept"}
    shown = subprocess.run(
        [*COMMAND, "show", "tiny", "--root", str(root), "--json"], capture_output=True, text=True, cwd=ROOT
    )
    assert json.loads(shown.stdout.splitlines()[-1])["state"] == "Completed"
    assert "teacher budget" in shown.stderr
    said = (tmp_path / "said.txt").read_text() + json.dumps(result) + shown.stdout + shown.stderr
    assert witness.leaks(root, tmp_path / "home", said=said) == []
    # It looked where there was something to be seen.
    assert any(command.endswith("spec.json") for command in witness.commands)
    assert any(file.name == "gcs_server.out" for file in witness.logs)


def failed(config: Path, root: Path, **given: str) -> tuple[int, dict[str, Any], str]:
    """Exit code of a run that fails, its result, and all that it said."""
    process = start(config, root, "--yes", said=config.parent / "said.txt", **given)
    output, _ = process.communicate(timeout=SECONDS)
    return process.returncode, json.loads(output.splitlines()[-1]), output + (config.parent / "said.txt").read_text()


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_key_that_is_refused_is_not_told(endpoint: Endpoint, tmp_path: Path) -> None:
    (url, proxy), root, wrong = endpoint, tmp_path / "root", f"wrong-{served.KEY[::-1]}"
    proxy.reset()
    config = settings(tmp_path, url)
    with Witness(root, served.KEY, wrong) as witness:
        code, result, said = failed(config, root, **{**GIVEN, KEY_VARIABLE: wrong})
        assert (code, result["state"], proxy.requests) == (2, "Refused", [])
        assert result["problems"] == [f"models.teacher: key_variable: {url} refuses the key in {KEY_VARIABLE}"]
        # The plan finds nothing wrong with a key that is withdrawn afterwards; replies repeat it.
        proxy.faults.extend([401] * 1000)
        code, result, more = failed(config, root, **GIVEN)
    assert code != 0
    assert f"{url} refuses the key in {KEY_VARIABLE} (401)" in more
    assert proxy.requests
    assert proxy.billed[0] == 0
    assert witness.leaks(root, tmp_path / "home", said=said + more) == []
    assert any(command.endswith("spec.json") for command in witness.commands)
    assert any(file.name == "gcs_server.out" for file in witness.logs)

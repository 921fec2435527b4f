"""The commit of the code: from the image or from the checkout, in every manifest and in no fingerprint."""

import subprocess
from pathlib import Path

import pytest

from flows.commit import commit
from flows.story import runtime
from tasks.config import load_config
from tasks.config.base import Config
from tasks.page import versions
from tasks.stage import Runtime, Stage, StageSpec


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SWITCHYARD_COMMIT", raising=False)
    commit.cache_clear()


def test_a_checkout_names_its_commit_and_whether_it_was_changed(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert commit(tmp_path) is None
    git("init")
    (tmp_path / "inner").mkdir()
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    git("tag", "-a", "v1", "-m", "a tag is no commit")
    commit.cache_clear()
    short = git("rev-parse", "--short=12", "HEAD")
    assert commit(tmp_path) == short
    (tmp_path / "code.py").write_text("2")
    commit.cache_clear()
    assert commit(tmp_path) == f"{short}-dirty"
    assert commit(tmp_path / "inner") is None


def test_a_manifest_has_the_commit_and_its_fingerprint_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHYARD_COMMIT", "0123456789ab")
    config = load_config(Path("configs/quickstart.yaml"))
    spec = StageSpec(stage="s", module="tasks.s", root=str(tmp_path), runtime=runtime(config, "r-1"))
    made = Stage(spec, Config()).manifest
    assert versions({"s": made})["commit"] == "0123456789ab"
    plain = spec.model_copy(update={"runtime": Runtime()})
    assert plain.fingerprint == spec.fingerprint
    assert "commit" not in Stage(plain, Config()).manifest.versions

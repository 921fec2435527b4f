"""A recurring distillation with every real part: first run, nothing new, one that is killed and continued, rollback."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from whole import COMMAND, ROOT, SECONDS, finish, kill, start, wait_for_stage

from infra.store import LocalStore
from tasks.cycles import read_cycles
from tasks.promoted import current


def put(inbox: Path, name: str, first: int, count: int = 40) -> None:
    rows = [{"prompt": f"{n} + 1 = ?", "answer": str(n + 1)} for n in range(first, first + count)]
    (inbox / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([*COMMAND, *arguments, "--json"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.long
@pytest.mark.timeout(2 * SECONDS)
def test_weeks_of_a_pipeline(tmp_path: Path) -> None:
    inbox, root = tmp_path / "inbox", tmp_path / "root"
    inbox.mkdir()
    tiny.save_model(tmp_path / "teacher", seed=1)
    data = tiny.recurring(tmp_path, inbox, queries_per_month=60)
    data["warmup"] |= {"steps": 30, "learning_rate": 3.0e-3}
    config = tmp_path / "weekly.yaml"
    config.write_text(yaml.safe_dump(data))
    store = LocalStore(root)

    put(inbox, "a.jsonl", 0)
    (inbox / "half.jsonl").write_text('{"prompt": "1 + ')
    first = finish(start(config, root))
    assert first["promoted"], first["reason"]
    assert "base student outside the interval" in first["reason"]
    assert current(store, "tiny").fingerprint == first["stages"][-1]["fingerprint"]

    heads = {path.name for path in Path("/tmp").glob("switchyard-ray-*")}
    nothing = finish(start(config, root))
    assert (nothing["state"], nothing["stages"]) == ("Completed", [])
    assert nothing["message"].startswith("nothing new; ")
    assert "half.jsonl waits" in nothing["message"]
    assert {path.name for path in Path("/tmp").glob("switchyard-ray-*")} <= heads

    put(inbox, "b.jsonl", 40)
    killed = start(config, root)
    # The first run left one, too.
    wait_for_stage(root, "warmup-keep", "manifest.json", count=2)
    kill(killed, root)
    # It comes too late for the run that is continued.
    put(inbox, "c.jsonl", 80)
    second = finish(start(config, root))
    stages = {stage["name"]: stage for stage in second["stages"]}
    assert [name for name, stage in stages.items() if stage["reused"]][:2] == ["models", "prompts"]
    assert stages["replay"]["rows"]["kept"] > 0
    assert second["gate"][0]["text"].startswith("response loss final − promoted is")
    prompts = json.loads((root / f"stages/prompts/{stages['prompts']['fingerprint']}/manifest.json").read_text())
    assert prompts["facts"]["counts"]["heldout_before"] == 3
    assert list(prompts["facts"]["counts"]["sources"]) == ["inbox"]

    done = read_cycles(store, "tiny")[0].cycles
    assert [cycle.state for cycle in done] == ["done", "done"]
    assert [[Path(file.path).name for file in cycle.all_files] for cycle in done] == [["a.jsonl"], ["b.jsonl"]]
    assert [cycle.queries for cycle in done] == [24, 24]

    planned = command("plan", str(config), "--root", str(root))
    assert planned["run"].endswith("-0003")
    assert planned["teacher_queries"] == 12  # what is left of the month's 60
    assert command("verify", second["run"], "--root", str(root))["damaged"] == 0

    refused = subprocess.run([*COMMAND, "rollback", "--root", str(root)], capture_output=True, text=True, cwd=ROOT)
    if second["promoted"]:
        assert current(store, "tiny").fingerprint == first["stages"][-1]["fingerprint"]
    else:
        assert refused.returncode == 2
        assert "no student before" in refused.stderr

"""A stage on a failing machine: one clear line, and the next run continues where it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

from infra.audit import damages
from infra.manifest import Manifest, load_manifest
from infra.parts import committed_parts, read_rows
from infra.store import LocalStore
from tasks.stage import MARK, StageSpec

HERE = Path(__file__).parent
PROGRAM = HERE / "faulty_stage.py"


def perform(store: LocalStore, spec: StageSpec, **environment: str) -> subprocess.CompletedProcess[str]:
    """One run of the stage as a process."""
    place = store.root.parent / f"{spec.fingerprint}.json"
    place.write_text(spec.model_dump_json())
    command = [sys.executable, str(PROGRAM), "--spec", str(place)]
    paths = f"{HERE.parent.parent}:{os.environ.get('PYTHONPATH', '')}"
    settings = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=300)


def fault_line(ended: subprocess.CompletedProcess[str]) -> str:
    """The one line that the flow shows."""
    marks = [json.loads(line[len(MARK) :]) for line in ended.stdout.splitlines() if line.startswith(MARK)]
    (line,) = [mark["message"] for mark in marks if mark["kind"] == "fault"]
    assert ended.returncode == 1
    assert ended.stderr == ""
    assert "\n" not in line
    return str(line)


def finished(store: LocalStore, spec: StageSpec) -> Manifest:
    """Run the stage to its end; its manifest, whole and with every row once."""
    ended = perform(store, spec)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    manifest = load_manifest(store, spec.manifest_path)
    assert list(damages(store, manifest)) == []
    rows = read_rows(store, manifest, "rows")["row"].to_pylist()
    assert rows == list(range(spec.settings["shards"] * spec.settings["rows"]))
    # What others read by pattern is the same: no stray part of a run that died.
    parts = {store.root / part.path for part in manifest.tables["rows"].parts}
    assert set((store.root / spec.folder).rglob("*.parquet")) == parts
    return manifest


def stage(store: LocalStore, **settings: int) -> StageSpec:
    return StageSpec(stage="s", module="faulty_stage", root=store.uri, settings={"shards": 3, "rows": 1000, **settings})


def test_a_full_disk_is_one_line_and_the_next_run_continues(small_disk: Path) -> None:
    store = LocalStore(small_disk / "store")
    spec = stage(store, shards=4)
    (small_disk / "something-large").write_bytes(b"\0" * ((8 << 20) - 200_000))
    line = fault_line(perform(store, spec))
    assert "No space left on device: free some space; the same command continues" in line
    done = committed_parts(store, spec.folder, "rows")
    assert 0 < len(done) < 4
    # Nothing half-written stays to keep the disk full.
    assert not [path for path in store.root.rglob(".*") if path.is_file()]
    (small_disk / "something-large").unlink()
    assert finished(store, spec).facts["made"] == 4 - len(done)


def test_a_read_only_disk_is_one_line_and_the_next_run_continues(small_disk: Path) -> None:
    store = LocalStore(small_disk / "store")
    spec = stage(store)
    store.root.mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "Read-only file system: mount it writable" in fault_line_elsewhere(spec, small_disk)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert finished(store, spec).facts["made"] == 3


def fault_line_elsewhere(spec: StageSpec, disk: Path) -> str:
    """Of a run whose spec lies on another disk than its store."""
    return fault_line(perform(LocalStore(disk.parent / "elsewhere"), spec))


def test_a_stage_killed_after_every_change_of_the_disk_ends_with_every_row_once(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    spec, kills = stage(store, shards=2), 0
    while not store.exists(spec.manifest_path):
        kills += 1
        ended = perform(store, spec, DIE_AFTER=str(kills))
        assert ended.returncode in (0, -9), ended.stdout + ended.stderr
    assert kills > 5
    finished(store, spec)


def test_a_replaced_part_is_found_and_made_anew(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    spec = stage(store)
    manifest = finished(store, spec)
    first, second, third = manifest.tables["rows"].parts
    # Another part's bytes are sound Parquet, but not these rows.
    store.write(second.path, store.read(first.path))
    (found,) = damages(store, manifest)
    assert found.path == second.path
    store.delete(manifest.path)
    store.delete(found.record or "")
    store.delete(found.path)
    assert finished(store, spec).facts["made"] == 1
    assert committed_parts(store, spec.folder, "rows")[2] == third


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path) -> None:
    library = tmp_path / "jumping.so"
    subprocess.run(["g++", "-x", "c", "-shared", "-fPIC", "-o", library, HERE / "jumping_clock.c", "-ldl"], check=True)
    jumps = subprocess.run(
        [sys.executable, "-c", "import time; print(time.time() - time.time())"],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
    )
    assert abs(float(jumps.stdout)) > 10_000
    store = LocalStore(tmp_path / "store")
    spec = stage(store)
    ended = perform(store, spec, LD_PRELOAD=str(library))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert list(damages(store, load_manifest(store, spec.manifest_path))) == []


def test_a_lease_is_timed_without_the_wall_clock(tmp_path: Path) -> None:
    """An engine room on a jumping clock neither closes early nor stays open."""
    library = tmp_path / "jumping.so"
    subprocess.run(["g++", "-x", "c", "-shared", "-fPIC", "-o", library, HERE / "jumping_clock.c", "-ldl"], check=True)
    script = """
import sys, threading, time
from infra import engine_room
from infra.store import open_store
engine_room.WATCH_SECONDS = 0.1
store, ended = open_store(sys.argv[1]), []
store.write("lease", b"0")
def renew():
    for count in range(10):
        time.sleep(0.2)
        assert not ended
        store.write("lease", str(count).encode())
renewing = threading.Thread(target=renew)
renewing.start()
engine_room.watch(store, "lease", 1.5)
ended.append(True)
assert not renewing.is_alive()
print("closed after the last renewal")
"""
    command = [sys.executable, "-c", script, str(tmp_path / "store")]
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parent.parent)
    assert ended.stdout == "closed after the last renewal\n", ended.stderr

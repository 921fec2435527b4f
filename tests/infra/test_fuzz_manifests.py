"""Manifests, records and parts that were damaged or written by somebody else: refused in one line, made anew, and
nothing outside of the store is read, written or removed."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pytest
from garbage import EXAMPLES, damaged, fuzz, lines, mutated
from hypothesis import example, given

from flows.cli import main
from flows.record import RunRecord, StageRecord, load_record
from flows.upkeep import garbage, verify
from infra.audit import damages, forget_object
from infra.manifest import SEAL, DamagedError, File, Manifest, commit_manifest, load_manifest
from infra.parts import close_table, commit_part, committed_parts, read_record, read_rows, record_path
from infra.store import LocalStore
from tasks.cycles import Cycle, change, read_cycles
from tasks.promoted import current, history, promote, roll_back

pytestmark = pytest.mark.timeout(7200 if EXAMPLES else 600)
SCHEMA = pa.schema([("id", pa.string()), ("ids", pa.list_(pa.int32())), ("blob", pa.binary())])
SHARDS = 3


def rows(shard: int) -> pa.Table:
    made = [{"id": f"{shard}-{n}", "ids": list(range(n)), "blob": bytes(n)} for n in range(20)]
    return pa.Table.from_pylist(made, SCHEMA)


def make(store: LocalStore) -> Manifest:
    """The stage's output, or what is missing of it."""
    manifest = Manifest(
        stage="s", module="m", version=1, fingerprint="f" * 16, settings={"a": [1]}, inputs={"x": "y/z"}
    )
    done = committed_parts(store, manifest.folder, "rows")
    for shard in range(SHARDS):
        if shard not in done:
            commit_part(store, manifest.folder, "rows", shard, rows(shard))
    manifest.tables["rows"] = close_table(store, manifest.folder, "rows", SCHEMA)
    store.write(f"{manifest.folder}/files/weights", b"bytes")
    digest = "277089d91c0bdf4f2e6862ba7e4a07605119431f5d13f726dd352b06f1b206a9"
    manifest.files["model"] = [File(path=f"{manifest.folder}/files/weights", bytes=5, sha256=digest)]
    return commit_manifest(store, manifest)


class Place:
    """A store with a finished stage, its run and promotion; and beside it what must not be touched."""

    def __init__(self, folder: Path) -> None:
        self.outside = folder / "outside"
        self.outside.mkdir()
        for name in ("manifest.json", "part-00000-0.parquet", "x"):
            (self.outside / name).write_text("not yours")
        self.store = LocalStore(folder / "root")
        self.manifest = make(self.store)
        path = self.manifest.path
        stage = StageRecord(name="s", fingerprint="f" * 16, manifest=path)
        named: dict[str, Any] = {"run": "r-1", "name": "r", "root": self.store.uri, "config": {"seed": 1}}
        self.run = RunRecord(**named, state="Completed", stages=[stage], touched={"s": path})
        self.run.save(self.store)
        facts: dict[str, Any] = {"reason": "", "verdict": "", "metrics": {}, "student": "s", "report": "r"}
        for number in range(2):
            over = str(number - 1) if number else None
            assert promote(self.store, "r", over, run=f"r-{number}", fingerprint=str(number), manifest=path, **facts)
        cycle = Cycle.model_validate({"number": 1, "opened": "2026-01-01T00:00:00Z", "queries": 5, "prompts": path})
        change(self.store, "r", lambda _: cycle)

    def file(self, path: str) -> Path:
        return self.store.root / path

    @contextmanager
    def holding(self, path: str, data: bytes) -> Iterator[None]:
        """Other bytes stand there meanwhile."""
        before = self.file(path).read_bytes()
        self.file(path).write_bytes(data)
        try:
            yield
        finally:
            self.file(path).write_bytes(before)

    def untouched(self) -> None:
        assert [file.read_text() for file in self.outside.iterdir()] == ["not yours"] * 3


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """No power fails here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


def told(act: Callable[[], Any]) -> str:
    """What is said of it: nothing where it goes well, else one line."""
    try:
        act()
    except ValueError as error:
        lines([str(error)])
        return str(error)
    return ""


ORIGINAL: dict[str, bytes] = {}


def originals(kind: str) -> Any:
    """What the stage of these tests writes, by its kind. Made once: strategies are built before fixtures."""
    if not ORIGINAL:
        with TemporaryDirectory() as folder:
            made = Place(Path(folder))
            part = made.manifest.tables["rows"].parts[1]
            paths = {
                "manifest": made.manifest.path,
                "part": part.path,
                "record": record_path(made.manifest.folder, "rows", 1),
                "run": made.run.path,
                "promoted": "promoted/r.json",
                "entry": "promoted/r/000001.json",
                "cycles": "recurring/r.json",
            }
            ORIGINAL.update({name: made.file(path).read_bytes() for name, path in paths.items()})
    return ORIGINAL[kind]


def values_of(kind: str) -> Any:
    """Without the hash: as somebody else would write it, or an older version did."""
    return json.loads(b"{" + SEAL.sub(b"", originals(kind)) if SEAL.match(originals(kind)) else originals(kind))


def written(document: Any) -> bytes:
    return json.dumps(document, default=str).encode()


def look_at_stage(place: Place) -> None:
    """Everything that reads a manifest: readers, ``verify`` with its repair, and ``gc``. Then all is made again."""
    store, path = place.store, place.manifest.path
    told(lambda: garbage(store))
    if not told(lambda: load_manifest(store, path)):
        manifest = load_manifest(store, path)
        for name in manifest.tables:
            told(lambda: read_rows(store, manifest, name))  # noqa: B023 (called at once)
    for _, found in verify(store, place.run, repair=True):
        lines([damage.what for damage in found])
    place.untouched()
    store.delete(path)
    assert list(damages(store, make(store))) == []


def crossed(document: Any) -> Any:
    """One part named as another's."""
    first, second, _ = document["tables"]["rows"]["parts"]
    first["path"] = second["path"]
    return document


def filed(document: Any) -> Any:
    """A part among the files."""
    document["files"]["model"][0]["path"] = document["tables"].pop("rows")["parts"][1]["path"]
    return document


@fuzz(0.4)
@given(document=mutated([values_of("manifest")]))
@example(document={**values_of("manifest"), "format": 20})
@example(document=crossed(values_of("manifest")))
@example(document=filed(values_of("manifest")))
@example(document={**values_of("manifest"), "stage": "../../outside"})
@example(document={**values_of("manifest"), "fingerprint": "../../../outside"})
def test_a_manifest_with_other_values(place: Place, document: Any) -> None:
    with place.holding(place.manifest.path, written(document)):
        look_at_stage(place)


@fuzz(0.4)
@given(data=damaged([originals("manifest")]))
@example(data=b"")
@example(data=b"[" * 100_000)
@example(data=b'{"stage": NaN}')
@example(data=originals("manifest").replace(b"sha256", b"rha256", 1).replace(b'"rows": 20', b'"rows": 21', 1))
def test_a_manifest_with_other_bytes(place: Place, data: bytes) -> None:
    with place.holding(place.manifest.path, data):
        # The hash in its head tells; damage to the head alone leaves it as good as one of an older version.
        if not told(lambda: load_manifest(place.store, place.manifest.path)):
            found = load_manifest(place.store, place.manifest.path)
            assert found == Manifest.model_validate_json(originals("manifest"))
        look_at_stage(place)


@pytest.mark.parametrize(
    "path",
    ["../../outside/x", "/etc/passwd", "s3://other-bucket/x", "stages/s/other/rows/part-00000-0.parquet", "linked/x"],
)
@pytest.mark.parametrize("what", ["part", "file"])
def test_a_manifest_cannot_name_what_is_not_its_own(place: Place, path: str, what: str) -> None:
    document = values_of("manifest")
    named = document["tables"]["rows"]["parts"][0] if what == "part" else document["files"]["model"][0]
    named["path"] = path
    with place.holding(place.manifest.path, written(document)):
        assert "is damaged" in told(lambda: load_manifest(place.store, place.manifest.path))
        look_at_stage(place)


def test_links_do_not_lead_out_of_the_store(place: Place, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "root")
    (tmp_path / "root" / "real").mkdir(parents=True)
    (tmp_path / "root" / "linked").symlink_to(place.outside)
    (tmp_path / "root" / "file").symlink_to(place.outside / "x")
    (tmp_path / "root" / "inside").symlink_to(tmp_path / "root" / "real")
    acts = (store.read, store.delete, store.exists, store.localise, lambda path: list(store.list(path)))
    for act in (*acts, lambda path: store.write(path, b"")):
        for path in ("linked/x", "file"):
            with pytest.raises(ValueError, match="symbolic link"):
                act(path)
    store.write("inside/x", b"x")
    assert store.read("real/x") == b"x"
    # The root itself may be a link.
    (tmp_path / "other").symlink_to(tmp_path / "root")
    assert LocalStore(tmp_path / "other").read("real/x") == b"x"
    place.untouched()


@fuzz(0.3)
@given(data=mutated([values_of("record")]).map(written) | damaged([originals("record")]))
@example(data=written({**values_of("record"), "path": "../../outside/x"}))
@example(data=written({**values_of("record"), "shard": 2}))
@example(data=originals("record").replace(b"part-00001", b"part-0001"))
def test_commit_records(place: Place, data: bytes) -> None:
    store, folder = place.store, place.manifest.folder
    path = record_path(folder, "rows", 1)
    with place.holding(path, data), place.holding(place.manifest.path, originals("manifest")):
        try:
            part = read_record(store, path)
        except DamagedError as error:
            lines([str(error)])
            forget_object(store, error.path)
        else:
            assert part.path.startswith(f"{folder}/rows/part-00001-")
            if data != originals("record"):
                forget_object(store, part.path)
        place.untouched()
        store.delete(place.manifest.path)
        assert list(damages(store, make(store))) == []


@fuzz(0.5)
@given(data=damaged([originals("part")]))
def test_a_damaged_part_is_refused_and_made_again(place: Place, data: bytes) -> None:
    part = place.manifest.tables["rows"].parts[1]
    with place.holding(part.path, data):
        said = told(lambda: read_rows(place.store, place.manifest, "rows"))
        assert bool(said) == (data != originals("part"))
        found = list(damages(place.store, place.manifest))
        assert [damage.path for damage in found] == [part.path] * bool(said)
        if said:
            forget_object(place.store, part.path)
            assert read_rows(place.store, make(place.store), "rows").num_rows == 20 * SHARDS


@fuzz(0.3)
@given(data=damaged([originals("part")]))
@example(data=originals("part").replace(b"item", b"\xecdem"))
def test_a_part_whose_hash_was_written_anew_is_no_trap(place: Place, data: bytes) -> None:
    """By somebody who can write manifests: Arrow has to refuse the bytes by itself."""
    import hashlib

    manifest = load_manifest(place.store, place.manifest.path)
    part = manifest.tables["rows"].parts[1]
    part.sha256, part.bytes = hashlib.sha256(data).hexdigest(), len(data)
    with place.holding(part.path, data):
        told(lambda: read_rows(place.store, manifest, "rows"))
        lines([damage.what for damage in damages(place.store, manifest)])


READERS: dict[str, tuple[str, Callable[[LocalStore], Any]]] = {
    "run": ("runs/r-1/run.json", lambda store: load_record(store, "r-1")),
    "promoted": ("promoted/r.json", lambda store: (current(store, "r"), history(store, "r"), roll_back(store, "r"))),
    "entry": ("promoted/r/000001.json", lambda store: (history(store, "r"), roll_back(store, "r"))),
    "cycles": ("recurring/r.json", lambda store: read_cycles(store, "r")),
}


@pytest.mark.parametrize("kind", READERS)
def test_records_of_runs_promotions_and_cycles(tmp_path: Path, kind: str) -> None:
    path, read = READERS[kind]
    place = Place(tmp_path)

    @fuzz(0.1)
    @given(data=mutated([values_of(kind)]).map(written) | damaged([originals(kind)]))
    @example(data=written({**values_of(kind), "name": "another"}))
    @example(data=written({**values_of(kind), "manifest": "x" * 5000}))
    @example(data=written({**values_of(kind), "previous": 7}))
    def each(data: bytes) -> None:
        with (
            place.holding(path, data),
            place.holding("promoted/r.json", data if kind == "promoted" else originals("promoted")),
        ):
            told(lambda: read(place.store))
            told(lambda: garbage(place.store))
            # What is taken leads to places in the store only.
            for entry in history(place.store, "r") if not told(lambda: history(place.store, "r")) else ():
                for place_ in (entry.student, entry.report, entry.manifest):
                    assert place.store.location(place_)
        for file in list(place.store.list("promoted/r")):
            if file > "promoted/r/000002.json":
                place.store.delete(file)
        place.untouched()

    each()


OF_RUNS = ["show r", "compare r r", "signals r", "verify r", "trace x --run r", "gc"]
READ_BY = {"manifest": OF_RUNS, "run": OF_RUNS, "promoted": ["gc", "rollback"], "entry": ["gc", "rollback"]}


@pytest.mark.parametrize(("kind", "command"), [(kind, command) for kind in READ_BY for command in READ_BY[kind]])
def test_every_command_says_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, command: str
) -> None:
    place = Place(tmp_path)
    path = place.manifest.path if kind == "manifest" else READERS[kind][0]
    place.file(path).write_bytes(originals(kind).replace(b"s", b"z", 1)[:-9] + b"\x1b[2J")
    monkeypatch.setattr("sys.argv", ["switchyard", *command.split(), "--root", place.store.uri])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    told = said.out.splitlines() if (kind, command) == ("manifest", "verify r") else said.err.splitlines()
    assert ended.value.code in (1, 2)
    assert len([line for line in told if path in line]) == 1, told
    assert "\x1b[2J" not in said.err + said.out

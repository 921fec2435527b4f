"""Training continues from a checkpoint that is whole, or from none."""

import itertools
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.s3 import S3Store
from infra.store import LocalStore, Store
from tasks.resume import LIST, newest, seal, sealed, storage, tidy
from tests.infra.faulty import Exchange, faulty, pass_on


def upload(store: Store, folder: Path, name: str, step: int) -> None:
    """A checkpoint of this step below ``checkpoints``, as training leaves it."""
    local = folder / name
    (local / "student").mkdir(parents=True)
    (local / "state.json").write_text(f'{{"step": {step}}}')
    (local / "student" / "model.safetensors").write_bytes(bytes([step]) * 5000)
    seal(local, step)
    store.upload(local, f"checkpoints/{name}")


def flip(data: bytes) -> bytes:
    return data[:100] + bytes([data[100] ^ 1]) + data[101:]


DAMAGES: dict[str, Callable[[Store, str], None]] = {
    "cut off before its sums": lambda store, place: store.delete(f"{place}/sums.json"),
    "cut off in its sums": lambda store, place: store.write(f"{place}/sums.json", store.read(f"{place}/sums.json")[:9]),
    "cut off in its weights": lambda store, place: store.write(f"{place}/student/model.safetensors", b"\3" * 4999),
    "a file is missing": lambda store, place: store.delete(f"{place}/state.json"),
    "bit-flipped": lambda store, place: store.write(
        f"{place}/student/model.safetensors", flip(store.read(f"{place}/student/model.safetensors"))
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_never_used(store: Store, tmp_path: Path, damage: str) -> None:
    # Names carry times, and clocks jump: steps say which is newer.
    for step, name in ((1, "checkpoint_c"), (2, "checkpoint_b"), (3, "checkpoint_a")):
        upload(store, tmp_path / "made", name, step)
    system, place = storage(store, "checkpoints")
    with newest(system, place) as folder:
        assert folder
        assert (folder / "state.json").read_text() == '{"step": 3}'
    DAMAGES[damage](store, "checkpoints/checkpoint_a")
    with newest(system, place) as folder:
        assert folder
        assert (folder / "state.json").read_text() == '{"step": 2}'


def test_what_ended_attempts_left_is_removed(store: Store, tmp_path: Path) -> None:
    for step in range(1, 6):
        upload(store, tmp_path / "made", f"checkpoint_{step}", step)
    DAMAGES["cut off in its weights"](store, "checkpoints/checkpoint_5")
    store.write(f"checkpoints/{LIST}", b'{"half')
    system, place = storage(store, "checkpoints")
    tidy(system, place, keep=2)
    assert [step for step, _ in sealed(system, place)] == [4, 3]
    # Arrow leaves an empty object in place of a folder.
    left = {path.split("/")[1] for path in store.list("checkpoints") if not path.endswith("/")}
    assert left == {"checkpoint_3", "checkpoint_4"}


def test_a_stage_that_never_saved_starts_at_its_beginning(tmp_path: Path) -> None:
    system, place = storage(LocalStore(tmp_path), "stages/train/x/checkpoints")
    tidy(system, place, keep=2)
    with newest(system, place) as folder:
        assert folder is None


def test_a_checkpoint_goes_to_s3_in_parallel_parts(
    s3_server: str, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray Train sends it: parts of 10 MiB, the next while the last is on its way."""
    from ray.train.v2._internal.execution.storage import _upload_to_fs_path

    (tmp_path / "checkpoint").mkdir()
    size = 30 << 20
    with (tmp_path / "checkpoint" / "weights.safetensors").open("wb") as file:
        file.truncate(size)
    parts, two, waited = itertools.count(1), threading.Event(), []

    def held(exchange: Exchange) -> None:
        """The first part's answer waits until a second has come."""
        if "partNumber=" in exchange.path:
            if next(parts) == 2:
                two.set()
            waited.append(two.wait(30))
        pass_on(exchange)

    with faulty(s3_server) as proxy:
        proxy.fault, proxy.always = held, True
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        system, place = storage(S3Store(s3_bucket, "prefix"), "checkpoints/checkpoint_1")
        _upload_to_fs_path(str(tmp_path / "checkpoint"), system, place)
        assert system.get_file_info(f"{place}/weights.safetensors").size == size
    assert waited == [True, True, True]

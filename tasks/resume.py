"""Which checkpoint training continues from: the newest that is whole, whatever was cut off, damaged or half copied.

    <checkpoints>/checkpoint_…/sums.json    its step, and every other file's size and SHA-256

Ray Train's own list of checkpoints is written in place, so a kill may cut it off, and it trusts what it lists. Only the
sums are trusted here, and steps order checkpoints, not the times in their names.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pyarrow.fs

from infra.store import Store

SUMS = "sums.json"
LIST = "checkpoint_manager_snapshot.json"
log = logging.getLogger(__name__)


def storage(store: Store, path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """A place of the store as Arrow's file systems name it, for Ray Train's checkpoints."""
    place = urlparse(store.location(path))
    if place.scheme != "s3":
        return pyarrow.fs.LocalFileSystem(), place.path
    endpoint = urlparse(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "https:")
    system = pyarrow.fs.S3FileSystem(
        endpoint_override=endpoint.netloc or None,
        scheme=endpoint.scheme,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=8),
        connect_timeout=10,
        request_timeout=60,
    )
    return system, place.netloc + place.path


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal(folder: Path, step: int) -> None:
    """Write down what a finished checkpoint's folder holds."""
    files = {
        file.relative_to(folder).as_posix(): [file.stat().st_size, digest(file)]
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    (folder / SUMS).write_text(json.dumps({"step": step, "files": files}))


def whole(folder: Path) -> bool:
    """Whether every file is there as it was sealed."""
    files = json.loads((folder / SUMS).read_text())["files"]
    return all((folder / name).is_file() and digest(folder / name) == sum_ for name, (_, sum_) in files.items())


def sealed(system: Any, place: str) -> list[tuple[int, str]]:
    """(step, path) of the checkpoints whose files have the sizes they were sealed with, the newest first."""
    found = []
    for folder in folders(system, place):
        entries = system.get_file_info(pyarrow.fs.FileSelector(folder, recursive=True))
        sizes = {entry.path[len(folder) + 1 :]: entry.size for entry in entries if entry.is_file}
        try:
            with system.open_input_stream(f"{folder}/{SUMS}") as stream:
                sums = json.loads(stream.read())
            step, whole = int(sums["step"]), all(sizes.get(name) == size for name, (size, _) in sums["files"].items())
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
        if whole:
            found.append((step, folder))
    return sorted(found, reverse=True)


def folders(system: Any, place: str) -> list[str]:
    entries = system.get_file_info(pyarrow.fs.FileSelector(place, allow_not_found=True))
    return [entry.path for entry in entries if entry.base_name.startswith("checkpoint_") and not entry.is_file]


@contextmanager
def newest(system: Any, place: str) -> Iterator[Path | None]:
    """A local folder with the newest whole checkpoint, for the time of the block; None where there is none."""
    from ray.train import Checkpoint

    for step, path in sealed(system, place):
        with Checkpoint(path, system).as_directory() as folder:
            if whole(Path(folder)):
                yield Path(folder)
                return
        log.warning("the checkpoint of step %d is damaged: an earlier one is taken", step)
    yield None


def tidy(system: Any, place: str, keep: int) -> None:
    """Remove what an ended attempt left: cut-off checkpoints, all but the last ``keep``, and Ray Train's list."""
    kept = {path for _, path in sealed(system, place)[:keep]}
    for folder in folders(system, place):
        if folder not in kept:
            system.delete_dir(folder)
    if system.get_file_info(f"{place}/{LIST}").is_file:
        system.delete_file(f"{place}/{LIST}")

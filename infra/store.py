"""The store: named bytes in a local folder or an S3 bucket, behind one small interface.

Three promises carry everything above it:
- ``write`` and ``create`` are atomic: a reader sees the whole object or none.
- ``create`` is exclusive: of any number of writers of one path exactly one wins, and every other is told so.
- ``swap`` replaces only what its caller has read: no change of another writer is lost.

Paths are relative to the store's root, use ``/``, and cannot leave the root.
"""

import fcntl
import hashlib
import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, BinaryIO
from urllib.parse import urlparse

from pydantic import AfterValidator

# What has bytes to write: ``bytes``, or an Arrow buffer, which is not copied.
Bytes = Any
# What is read of an object at once where not all of it is needed.
PIECE_BYTES = 1 << 20
# Of a path, by S3, and of a name in it, by file systems.
PATH_BYTES, NAME_BYTES = 1024, 255


def check_path(path: str) -> str:
    """The path itself, or ValueError where it is empty, absolute, climbs out of the root, or is too long for a disk or
    S3."""
    pure = PurePosixPath(path)
    sizes = [len(name.encode("utf-8", "surrogatepass")) for name in (path, *pure.parts)]
    if sizes[0] > PATH_BYTES or max(sizes[1:], default=0) > NAME_BYTES:
        raise ValueError(f"store path {path[:80]!r}… is too long: {PATH_BYTES} bytes at most, and {NAME_BYTES} a name")
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path:
        raise ValueError(f"store path {path!r} leaves the store: use a relative path without '..'")
    return str(pure)


# A path that an object of the store names: it stays below the store's root.
StorePath = Annotated[str, AfterValidator(check_path)]


class Store(ABC):
    """Bytes by path under one root. ``uri`` names the root and opens the same store again."""

    uri: str

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The object's bytes; FileNotFoundError where there is none."""

    @abstractmethod
    def digest(self, path: str) -> tuple[int, str]:
        """The object's size in bytes and its SHA-256, read piece by piece; FileNotFoundError where there is none."""

    @abstractmethod
    def write(self, path: str, data: Bytes) -> None:
        """Put the object, replacing what stood there."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> bool:
        """Put the object only if none stands there. True: these bytes are now the object. False: another's are."""

    @abstractmethod
    def swap(self, path: str, old: bytes | None, new: bytes) -> bool:
        """Replace the object only if it still holds ``old`` (None: only if there is none). True: ``new`` stands there.
        Every writer of such a path uses ``swap``."""

    @abstractmethod
    def exists(self, path: str) -> bool: ...

    @abstractmethod
    def list(self, prefix: str) -> Iterator[str]:
        """Paths of all objects below the folder ``prefix``, sorted."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove the object; nothing happens where there is none."""

    @abstractmethod
    def upload(self, folder: Path, prefix: str) -> None:
        """Copy every file of a local folder below ``prefix``."""

    @abstractmethod
    def copy(self, source: str, target: str) -> None:
        """Put the object ``source`` at ``target`` too, without moving its bytes through this process."""

    @abstractmethod
    def localise(self, prefix: str, without: str = "") -> Path:
        """A local folder with the objects below ``prefix``: the store's own, or a cached copy, which may leave out
        those whose names end with ``without``. Read-only."""

    def location(self, path: str) -> str:
        """What a person opens: a local path or an s3:// address."""
        return f"{self.uri.rstrip('/')}/{check_path(path)}"


class LocalStore(Store):
    """A folder. Exclusive create is a hard link to a complete, synced file, which cannot be seen half-written."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.uri = str(self.root)

    def _at(self, path: str) -> Path:
        place = self.root / check_path(path)
        # The root itself may be a link, nothing below it that leads away.
        if not place.resolve().is_relative_to(self.root.resolve()):
            raise ValueError(f"store path {path!r} leaves the store {self.uri} by a symbolic link: put the files there")
        return place

    def read(self, path: str) -> bytes:
        return self._at(path).read_bytes()

    def digest(self, path: str) -> tuple[int, str]:
        with self._at(path).open("rb") as stream:
            return digest_of(stream)

    @contextmanager
    def _staged(self, target: Path) -> Iterator[Path]:
        """A name beside ``target`` to write to. Nothing stays under it, also where the disk is full halfway."""
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            yield staged
        finally:
            # Where even this fails, what failed before is the cause to tell.
            with suppress(OSError):
                staged.unlink(missing_ok=True)

    def write(self, path: str, data: Bytes) -> None:
        target = self._at(path)
        with self._staged(target) as staged:
            write_synced(staged, data)
            os.replace(staged, target)

    def create(self, path: str, data: bytes) -> bool:
        target = self._at(path)
        with self._staged(target) as staged:
            write_synced(staged, data)
            try:
                os.link(staged, target)
            except FileExistsError:
                return False
            return True

    def swap(self, path: str, old: bytes | None, new: bytes) -> bool:
        with self._locked(self._at(path)):
            if (self.read(path) if self.exists(path) else None) != old:
                return False
            self.write(path, new)
        return True

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """One process at a time; the lock ends with its holder, however that ends."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f".{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def exists(self, path: str) -> bool:
        return self._at(path).is_file()

    def list(self, prefix: str) -> Iterator[str]:
        # Names only: a folder of many thousands of parts takes little memory, and is sorted as S3 sorts it.
        found = (f"{folder}/{name}" for folder, _, names in os.walk(self._at(prefix)) for name in names)
        for file in sorted(found):
            # A leading dot marks a file that is still being written.
            if not os.path.basename(file).startswith("."):
                yield file.removeprefix(f"{self.root}/")

    def delete(self, path: str) -> None:
        self._at(path).unlink(missing_ok=True)

    def upload(self, folder: Path, prefix: str) -> None:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                target = self._at(f"{prefix}/{file.relative_to(folder).as_posix()}")
                with self._staged(target) as staged:
                    shutil.copyfile(file, staged)
                    sync(staged)
                    os.replace(staged, target)

    def copy(self, source: str, target: str) -> None:
        place = self._at(target)
        with self._staged(place) as staged:
            # Objects are replaced, never changed in place, so a second name for the same bytes is a copy.
            os.link(self._at(source), staged)
            os.replace(staged, place)

    def localise(self, prefix: str, without: str = "") -> Path:
        return self._at(prefix)


def digest_of(stream: BinaryIO) -> tuple[int, str]:
    """Size in bytes and SHA-256 of all that a stream still has."""
    found, size = hashlib.sha256(), 0
    while piece := stream.read(PIECE_BYTES):
        found.update(piece)
        size += len(piece)
    return size, found.hexdigest()


def write_synced(file: Path, data: Bytes) -> None:
    """Bytes on disk, not only on their way. OSErrors name the file."""
    try:
        with file.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        error.filename = str(file)
        raise


def sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


@lru_cache(maxsize=16)
def open_store(uri: str) -> Store:
    """The store at a folder or ``s3://bucket/prefix``. ValueError for any other scheme."""
    parsed = urlparse(uri)
    if parsed.scheme == "s3":
        from infra.s3 import S3Store

        return S3Store(parsed.netloc, parsed.path)
    if parsed.scheme in ("", "file"):
        return LocalStore(Path(parsed.path))
    raise ValueError(f"root: {uri!r} is neither a folder nor s3://bucket/prefix; use one of these")

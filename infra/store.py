"""The store: named bytes in a local folder or an S3 bucket, behind one small interface.

Two promises carry everything above it:
- ``write`` and ``create`` are atomic: a reader sees the whole object or none.
- ``create`` is exclusive: of any number of writers of one path exactly one wins, and every other is told so.

Paths are relative to the store's root, use ``/``, and cannot leave the root.
"""

import os
import shutil
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse


def check_path(path: str) -> str:
    """The path itself, or ValueError where it is empty, absolute or climbs out of the root."""
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path:
        raise ValueError(f"store path {path!r} leaves the store: use a relative path without '..'")
    return str(pure)


class Store(ABC):
    """Bytes by path under one root. ``uri`` names the root and opens the same store again."""

    uri: str

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The object's bytes; FileNotFoundError where there is none."""

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Put the object, replacing what stood there."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> bool:
        """Put the object only if none stands there. True: these bytes are now the object. False: another's are."""

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
        return self.root / check_path(path)

    def read(self, path: str) -> bytes:
        return self._at(path).read_bytes()

    def _staged(self, path: Path, data: bytes) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        with staged.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return staged

    def write(self, path: str, data: bytes) -> None:
        os.replace(self._staged(self._at(path), data), self._at(path))

    def create(self, path: str, data: bytes) -> bool:
        staged = self._staged(self._at(path), data)
        try:
            os.link(staged, self._at(path))
        except FileExistsError:
            return False
        finally:
            staged.unlink()
        return True

    def exists(self, path: str) -> bool:
        return self._at(path).is_file()

    def list(self, prefix: str) -> Iterator[str]:
        for file in sorted(self._at(prefix).rglob("*")):
            # A leading dot marks a file that is still being written.
            if file.is_file() and not file.name.startswith("."):
                yield file.relative_to(self.root).as_posix()

    def delete(self, path: str) -> None:
        self._at(path).unlink(missing_ok=True)

    def upload(self, folder: Path, prefix: str) -> None:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                target = self._at(f"{prefix}/{file.relative_to(folder).as_posix()}")
                target.parent.mkdir(parents=True, exist_ok=True)
                staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
                shutil.copyfile(file, staged)
                os.replace(staged, target)

    def copy(self, source: str, target: str) -> None:
        self._at(target).parent.mkdir(parents=True, exist_ok=True)
        staged = self._at(target).with_name(f".{uuid.uuid4().hex}")
        # Objects are replaced, never changed in place, so a second name for the same bytes is a copy.
        os.link(self._at(source), staged)
        os.replace(staged, self._at(target))

    def localise(self, prefix: str, without: str = "") -> Path:
        return self._at(prefix)


class S3Store(Store):
    """A bucket prefix on S3 or anything that speaks it. Credentials, region and endpoint by boto3's standard chain
    (``AWS_ENDPOINT_URL`` names another server)."""

    # How often a conflicting or unanswered conditional put is tried before its error is let through.
    CREATE_TRIES = 5

    def __init__(self, bucket: str, prefix: str, cache: Path | None = None) -> None:
        import boto3
        from botocore.config import Config

        self.bucket, self.prefix = bucket, prefix.strip("/")
        self.uri = f"s3://{bucket}/{self.prefix}".rstrip("/")
        self.cache = cache or Path(tempfile.gettempdir()) / f"switchyard-{os.getuid()}"
        self.client: Any = boto3.client(
            "s3",
            config=Config(
                retries={"mode": "standard", "max_attempts": 8},
                # Servers older than boto3 1.36's default checksums reject them.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                max_pool_connections=32,
            ),
        )

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{check_path(path)}".lstrip("/")

    def read(self, path: str) -> bytes:
        try:
            return self.client.get_object(Bucket=self.bucket, Key=self._key(path))["Body"].read()
        except self.client.exceptions.NoSuchKey:
            raise FileNotFoundError(f"no object {self.location(path)}") from None

    def write(self, path: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=self._key(path), Body=data)

    def create(self, path: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        # A retried put whose first answer was lost meets its own object: the writer's id tells it from another's.
        writer = uuid.uuid4().hex
        for attempt in range(self.CREATE_TRIES):
            try:
                self.client.put_object(
                    Bucket=self.bucket, Key=self._key(path), Body=data, IfNoneMatch="*", Metadata={"writer": writer}
                )
                return True
            except ClientError as error:
                status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                if status == 412:
                    head = self.client.head_object(Bucket=self.bucket, Key=self._key(path))
                    return head["Metadata"].get("writer") == writer
                # 409: another conditional put is under way on the same key.
                if status != 409 or attempt == self.CREATE_TRIES - 1:
                    raise
                time.sleep(0.1 * 2**attempt)
        raise AssertionError("unreachable: the last try returns or raises")

    def exists(self, path: str) -> bool:
        from botocore.exceptions import ClientError

        try:
            self.client.head_object(Bucket=self.bucket, Key=self._key(path))
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return False
            raise
        return True

    def list(self, prefix: str) -> Iterator[str]:
        start = len(self._key("x")) - 1
        pages = self.client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self.bucket, Prefix=self._key(prefix) + "/"):
            yield from (item["Key"][start:] for item in page.get("Contents", ()))

    def delete(self, path: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=self._key(path))

    def upload(self, folder: Path, prefix: str) -> None:
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        with ThreadPoolExecutor(8) as pool:
            list(
                pool.map(
                    lambda file: self.client.upload_file(
                        str(file), self.bucket, self._key(f"{prefix}/{file.relative_to(folder).as_posix()}")
                    ),
                    files,
                )
            )

    def copy(self, source: str, target: str) -> None:
        self.client.copy({"Bucket": self.bucket, "Key": self._key(source)}, self.bucket, self._key(target))

    def localise(self, prefix: str, without: str = "") -> Path:
        """The copy is keyed by place: what stands below a committed prefix never changes, so it is fetched once."""
        target = self.cache / self.bucket / self._key(prefix)
        if target.is_dir():
            return target
        if without:
            target = target.with_name(f"{target.name}-without{without}")
            if target.is_dir():
                return target
        staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        paths = [path for path in self.list(prefix) if not (without and path.endswith(without))]
        if not paths:
            raise FileNotFoundError(f"nothing below {self.location(prefix)}")

        def fetch(path: str) -> None:
            file = staged / path[len(check_path(prefix)) + 1 :]
            file.parent.mkdir(parents=True, exist_ok=True)
            self.client.download_file(self.bucket, self._key(path), str(file))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(fetch, paths))
        # Another process of this machine may have brought the same copy meanwhile.
        with suppress(OSError):
            os.rename(staged, target)
        shutil.rmtree(staged, ignore_errors=True)
        return target


@lru_cache(maxsize=16)
def open_store(uri: str) -> Store:
    """The store at a folder or ``s3://bucket/prefix``. ValueError for any other scheme."""
    parsed = urlparse(uri)
    if parsed.scheme == "s3":
        return S3Store(parsed.netloc, parsed.path)
    if parsed.scheme in ("", "file"):
        return LocalStore(Path(parsed.path))
    raise ValueError(f"root: {uri!r} is neither a folder nor s3://bucket/prefix; use one of these")

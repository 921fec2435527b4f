"""The store on S3, or on anything that speaks it, through every fault that passes.

Requests that fail are repeated by boto3; bodies that break off, and conditional puts whose answer was lost, here.
"""

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from infra.store import Bytes, Store, check_path, digest_of

Answer = TypeVar("Answer")
# How often an answer whose body breaks off is asked for again.
TRIES = 5
# Seconds without a byte after which a connection counts as dead.
SILENCE_SECONDS = 60.0


def ask(call: Callable[..., Answer], *arguments: Any, **named: Any) -> Answer:
    """A client's answer. boto3 repeats requests that fail, but not those whose answer breaks off halfway."""
    for left in reversed(range(TRIES)):
        try:
            return call(*arguments, **named)
        except HTTPError as error:
            # What has botocore's own name has been repeated already.
            if isinstance(error, BotoCoreError) or not left:
                raise
    raise AssertionError("unreachable: the last try returns or raises")


def received(client: Any, take: Callable[[Any], Answer], **arguments: Any) -> Answer:
    """What is taken of the body of ``get_object``, from its beginning again where it breaks off."""
    for left in reversed(range(TRIES)):
        body = ask(client.get_object, **arguments)["Body"]
        try:
            return take(body)
        except (BotoCoreError, HTTPError):
            if not left:
                raise
    raise AssertionError("unreachable: the last try returns or raises")


def get_bytes(client: Any, **arguments: Any) -> bytes:
    """The body of ``get_object``, whole."""
    return received(client, lambda body: bytes(body.read()), **arguments)


def status_of(error: ClientError) -> int:
    """The HTTP status of an answer."""
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


def own(folder: Path) -> None:
    """Make a folder that only this user writes to: another's copy of a model is not to be trusted. ValueError where
    it is another's."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ValueError(f"{folder} can be written by others: remove it, or set TMPDIR to a folder of your own")


class S3Store(Store):
    """A bucket prefix on S3 or anything that speaks it. Credentials, region and endpoint by boto3's standard chain
    (``AWS_ENDPOINT_URL`` names another server)."""

    # How often a conflicting conditional put is tried before its error is let through.
    CREATE_TRIES = 5

    def __init__(self, bucket: str, prefix: str, cache: Path | None = None, silence: float = SILENCE_SECONDS) -> None:
        import boto3
        from botocore.config import Config

        self.bucket, self.prefix = bucket, prefix.strip("/")
        self.uri = f"s3://{bucket}/{self.prefix}".rstrip("/")
        self.cache = cache or Path(tempfile.gettempdir()) / f"switchyard-{os.getuid()}"
        self.client: Any = boto3.client(
            "s3",
            config=Config(
                # With pauses that double up to 20 s: about a minute of a server that answers nobody.
                retries={"mode": "standard", "max_attempts": 8},
                connect_timeout=min(10.0, silence),
                read_timeout=silence,
                # Servers older than boto3 1.36's default checksums reject them.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                max_pool_connections=32,
            ),
        )

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{check_path(path)}".lstrip("/")

    def read(self, path: str) -> bytes:
        return self._received(path, lambda body: bytes(body.read()))

    def digest(self, path: str) -> tuple[int, str]:
        return self._received(path, digest_of)

    def _received(self, path: str, take: Callable[[Any], Answer]) -> Answer:
        try:
            return received(self.client, take, Bucket=self.bucket, Key=self._key(path))
        except self.client.exceptions.NoSuchKey:
            raise FileNotFoundError(f"no object {self.location(path)}") from None

    def write(self, path: str, data: Bytes) -> None:
        # boto3 takes nothing but its own kinds of bytes.
        ask(self.client.put_object, Bucket=self.bucket, Key=self._key(path), Body=bytes(data))

    def create(self, path: str, data: bytes) -> bool:
        return self._put_if(path, data, IfNoneMatch="*")

    def swap(self, path: str, old: bytes | None, new: bytes) -> bool:
        if old is None:
            return self.create(path, new)
        found = self._head(path)
        # Whatever happens after this look makes the condition fail.
        return bool(found) and self.read(path) == old and self._put_if(path, new, IfMatch=found["ETag"])

    def _put_if(self, path: str, data: bytes, **condition: str) -> bool:
        """Put the object under a condition. False: it does not hold."""
        # A repeated put whose first answer was lost meets its own object: the writer's id tells it from another's.
        writer = uuid.uuid4().hex
        for attempt in range(self.CREATE_TRIES):
            try:
                ask(
                    self.client.put_object,
                    Bucket=self.bucket,
                    Key=self._key(path),
                    Body=data,
                    Metadata={"writer": writer},
                    **condition,
                )
                return True
            except ClientError as error:
                if error.response["Error"].get("Code") == "NoSuchKey":  # what was to be replaced is gone
                    return False
                if status_of(error) not in (409, 412):
                    raise
                # 409: another conditional put is under way on the same key.
                found = self._head(path) if status_of(error) == 412 else None
                if found:
                    return bool(found["Metadata"].get("writer") == writer)
            time.sleep(0.1 * 2**attempt)
        raise OSError(f"{self.location(path)}: conditional puts kept conflicting")

    def _head(self, path: str) -> Any:
        """What the server says of the object; None where there is none."""
        try:
            return ask(self.client.head_object, Bucket=self.bucket, Key=self._key(path))
        except ClientError as error:
            if status_of(error) == 404:
                return None
            raise

    def exists(self, path: str) -> bool:
        return self._head(path) is not None

    def list(self, prefix: str) -> Iterator[str]:
        start = len(self._key("x")) - 1
        more: dict[str, str] | None = {}
        while more is not None:
            page = ask(self.client.list_objects_v2, Bucket=self.bucket, Prefix=self._key(prefix) + "/", **more)
            yield from (item["Key"][start:] for item in page.get("Contents", ()))
            token = page.get("NextContinuationToken")
            more = {"ContinuationToken": token} if token else None

    def delete(self, path: str) -> None:
        ask(self.client.delete_object, Bucket=self.bucket, Key=self._key(path))

    def upload(self, folder: Path, prefix: str) -> None:
        def send(file: Path) -> None:
            key = self._key(f"{prefix}/{file.relative_to(folder).as_posix()}")
            ask(self.client.upload_file, str(file), self.bucket, key)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(send, (file for file in sorted(folder.rglob("*")) if file.is_file())))

    def copy(self, source: str, target: str) -> None:
        ask(self.client.copy, {"Bucket": self.bucket, "Key": self._key(source)}, self.bucket, self._key(target))

    def localise(self, prefix: str, without: str = "") -> Path:
        """The copy is keyed by place: what stands below a committed prefix never changes, so it is fetched once."""
        own(self.cache)
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
            # Keys may hold anything; what leads out of the store is refused before it is a path.
            file = staged / check_path(path)[len(check_path(prefix)) + 1 :]
            file.parent.mkdir(parents=True, exist_ok=True)
            ask(self.client.download_file, self.bucket, self._key(path), str(file))

        try:
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(fetch, paths))
            try:
                os.rename(staged, target)
            except OSError:
                # Another process of this machine may have brought the same copy meanwhile.
                if not target.is_dir():
                    raise
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        return target

"""Files that a user names: a local path or ``s3://bucket/key``, read as a seekable stream in bounded memory.

S3 by boto3's standard chain of credentials, region and endpoint, as in the store.
"""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlparse

from infra.s3 import S3Store, ask, get_bytes
from infra.store import open_store

# One request to S3 brings this much; larger reads bring what they ask for.
BUFFER_BYTES = 8 << 20


class S3File(io.RawIOBase):
    """An object read by ranges. A change of the object meanwhile is an error, not a mixture."""

    def __init__(self, client: Any, bucket: str, key: str) -> None:
        self.client, self.bucket, self.key = client, bucket, key
        head = ask(client.head_object, Bucket=bucket, Key=key)
        self.size, self.etag, self.at = head["ContentLength"], head["ETag"], 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        self.at = max(0, start + offset)
        return self.at

    def readinto(self, buffer: Any) -> int:
        if self.at >= self.size or not len(buffer):
            return 0
        last = min(self.at + len(buffer), self.size) - 1
        data = get_bytes(
            self.client, Bucket=self.bucket, Key=self.key, Range=f"bytes={self.at}-{last}", IfMatch=self.etag
        )
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


@contextmanager
def readable(uri: str) -> Iterator[None]:
    """Says what does not let itself be read, and why, in one line."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"no file {uri!r}: correct the path") from None
    except (ClientError, BotoCoreError) as error:
        raise ValueError(f"{uri!r} cannot be read ({error}): correct the address, or the AWS credentials") from None
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise ValueError(f"{uri!r} cannot be read ({error.strerror})") from None


def _s3(uri: str) -> tuple[Any, str, str] | None:
    parsed = urlparse(uri)
    if parsed.scheme != "s3":
        return None
    store = cast(S3Store, open_store(f"s3://{parsed.netloc}"))
    return store.client, parsed.netloc, parsed.path.lstrip("/")


def _local(uri: str) -> Path:
    return Path(uri.removeprefix("file://")).expanduser()


def open_file(uri: str) -> BinaryIO:
    """The file as a buffered, seekable stream of bytes. ValueError where it is missing or may not be read."""
    with readable(uri):
        place = _s3(uri)
        if place:
            return cast(BinaryIO, io.BufferedReader(S3File(*place), BUFFER_BYTES))
        return _local(uri).open("rb")


def file_size(uri: str) -> int:
    """Bytes."""
    with open_file(uri) as stream:
        return stream.seek(0, io.SEEK_END)


def find_files(uri: str, suffix: str) -> list[str]:
    """The file itself, or all files below a folder whose names end with ``suffix``, sorted. ValueError for none."""
    with readable(uri):
        place = _s3(uri)
        if place:
            client, bucket, key = place
            if key.endswith(suffix):
                return [uri]
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key.rstrip("/") + "/")
            keys = (item["Key"] for page in pages for item in page.get("Contents", ()))
            found = [f"s3://{bucket}/{key}" for key in keys]
        elif _local(uri).is_dir():
            found = [str(file) for file in _local(uri).rglob("*") if file.is_file()]
        else:
            return [uri]
    # A leading dot or underscore marks what writers leave beside their data.
    found = sorted(file for file in found if file.endswith(suffix) and file.rpartition("/")[2][0] not in "._")
    if not found:
        raise ValueError(f"no {suffix} file below {uri!r}: correct the path")
    return found


def content_id(uri: str) -> str:
    """Names a file's content: SHA-256 of the bytes of a local file, the ETag of an object on S3."""
    with readable(uri):
        place = _s3(uri)
        if place:
            client, bucket, key = place
            return f"etag:{client.head_object(Bucket=bucket, Key=key)['ETag']}"
        with _local(uri).open("rb") as stream:
            return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"

"""Inboxes: which files are whole, and which of them nobody took yet.

    arrived(source, taken)    files to take now, and those that wait, with the reason
    expand(source, files)     the same files as plain sources

A file is known by its place and stamp (size and time, or the ETag) without reading it, and by its content: a file that
was only renamed or touched is not taken again. What a file that grew holds of prompts taken before is told by their
ids, in the prompts stage.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from infra.files import Listed, content_id, list_files, open_file
from tasks.config.prompts import InboxSource, JsonlSource, ParquetSource

SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".parquet")
# A last line that is longer is not looked at.
TAIL_BYTES = 8 << 20


class InboxFile(BaseModel):
    """A file that a run takes."""

    path: str
    stamp: str  # size and time, or the ETag
    content: str  # names its bytes


def arrived(source: InboxSource, taken: Iterable[InboxFile]) -> tuple[list[InboxFile], dict[str, str]]:
    """Files of the inbox to take now, in the order of their names, and why others wait. ValueError where the folder
    cannot be listed."""
    stamps, contents = set(), set()
    for file in taken:
        stamps.add((file.path, file.stamp))
        contents.add(file.content)
    found: list[InboxFile] = []
    waiting: dict[str, str] = {}
    for listed in sorted(list_files(source.path)):
        if not listed.uri.endswith(SUFFIXES) or (listed.uri, listed.stamp) in stamps:
            continue
        if source.max_files is not None and len(found) == source.max_files:
            waiting[listed.uri] = f"the run takes {source.max_files} files (max_files)"
        elif reason := unfinished(source, listed):
            waiting[listed.uri] = reason
        elif (content := content_id(listed.uri)) not in contents:
            contents.add(content)
            found.append(InboxFile(path=listed.uri, stamp=listed.stamp, content=content))
    return found, waiting


def current(file: InboxFile) -> bool:
    """Whether a file still holds what it held when it was named."""
    try:
        return content_id(file.path) == file.content
    except ValueError:
        return False


def unfinished(source: InboxSource, file: Listed) -> str:
    """Why the file may still be being written; "" where it is whole."""
    if file.age is not None and file.age < source.quiet_seconds:
        return f"changed {file.age:.0f} s ago (quiet_seconds {source.quiet_seconds:g})"
    if not file.size:
        return "empty"
    with open_file(file.uri) as stream:
        if file.uri.endswith(".parquet"):
            return parquet_end(stream)
        return gzip_end(stream) if file.uri.endswith(".gz") else line_end(stream)


def parquet_end(stream: BinaryIO) -> str:
    try:
        pq.read_metadata(stream)
    except (pa.ArrowException, OSError):
        return "no Parquet footer"
    return ""


def gzip_end(stream: BinaryIO) -> str:
    """Reads it through: the trailer is checked against what was read."""
    try:
        with gzip.GzipFile(fileobj=stream) as text:
            while text.read(1 << 20):
                pass
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return "gzip is cut off"
    return ""


def line_end(stream: BinaryIO) -> str:
    """The last line ends, or is JSON as it stands."""
    size = stream.seek(0, 2)
    stream.seek(max(0, size - TAIL_BYTES))
    last = stream.read().rsplit(b"\n", 1)[-1]
    try:
        if last.strip():
            json.loads(last)
    except (ValueError, RecursionError):
        return "its last line is not whole"
    return ""


def inside(folder: str, file: str) -> bool:
    """Whether a file lies below a folder or prefix, by its path alone."""
    if folder.startswith("s3://"):
        return file.startswith(f"{folder.rstrip('/')}/")
    place = Path(folder.removeprefix("file://")).expanduser()
    return Path(os.path.abspath(file)).is_relative_to(os.path.abspath(place))


def expand(source: InboxSource, files: list[InboxFile]) -> list[JsonlSource | ParquetSource]:
    """A source for each file. ValueError where one does not lie in the inbox."""
    for file in files:
        if not inside(source.path, file.path):
            raise ValueError(
                f"{file.path!r} does not lie in the inbox {source.path!r}: give the path it was taken from"
            )
    task = source.task or source.path.rstrip("/").rpartition("/")[2]
    return [
        (ParquetSource if file.path.endswith(".parquet") else JsonlSource)(
            path=file.path, fields=source.fields, task=task
        )
        for file in files
    ]

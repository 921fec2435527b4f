"""Inboxes: which files are whole, and that none is taken twice, in a folder and on S3."""

import gzip
import json
import os
import time
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.config.prompts import InboxSource
from tasks.inbox import arrived, expand
from tasks.sources import check, read

LINE = json.dumps({"prompt": "1 + 1?"}) + "\n"


@pytest.fixture
def inbox(tmp_path: Path) -> InboxSource:
    (tmp_path / "inbox").mkdir()
    return InboxSource(path=str(tmp_path / "inbox"), quiet_seconds=0)


def put(inbox: InboxSource, name: str, content: bytes) -> Path:
    path = Path(inbox.path) / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def names(files) -> list[str]:
    return [Path(file.path).name for file in files]


def parquet(rows: int = 2) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"prompt": [f"{n}?" for n in range(rows)]}), sink)
    return sink.getvalue().to_pybytes()


def test_whole_files_of_known_kinds_in_the_order_of_their_names(inbox):
    put(inbox, "c.jsonl", LINE.encode())
    put(inbox, "a.parquet", parquet())
    put(inbox, "deep/b.jsonl.gz", gzip.compress(LINE.encode()))
    put(inbox, "notes.txt", b"hello")
    put(inbox, ".d.jsonl", LINE.encode())
    put(inbox, "_e.jsonl", LINE.encode())
    found, waiting = arrived(inbox, ())
    assert names(found) == ["a.parquet", "c.jsonl", "b.jsonl.gz"]
    assert waiting == {}
    sources = expand(inbox, found)
    assert [source.type for source in sources] == ["parquet", "jsonl", "jsonl"]
    assert {row.source for source in sources for row in read(source, "auto")} == {"inbox"}
    assert check(inbox) == 4


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", LINE.encode() + b'{"prompt": "2 +', "its last line is not whole"),
        ("a.jsonl", b"", "empty"),
        ("a.jsonl.gz", gzip.compress(LINE.encode() * 1000)[:-9], "gzip is cut off"),
        ("a.parquet", parquet()[:-20], "no Parquet footer"),
    ],
)
def test_a_file_that_is_being_written_waits(inbox, name, content, reason):
    path = put(inbox, name, content)
    assert arrived(inbox, ()) == ([], {str(path): reason})


def test_a_last_line_without_its_newline_may_be_whole(inbox):
    put(inbox, "a.jsonl", LINE.strip().encode())
    assert names(arrived(inbox, ())[0]) == ["a.jsonl"]


def test_a_file_changed_a_moment_ago_waits(inbox):
    path = put(inbox, "a.jsonl", LINE.encode())
    # A copy that keeps its times still changed just now.
    os.utime(path, (1, 1))
    patient = inbox.model_copy(update={"quiet_seconds": 3600.0})
    found, waiting = arrived(patient, ())
    assert not found
    assert "quiet_seconds 3600" in waiting[str(path)]


def test_files_are_taken_once(inbox):
    old = put(inbox, "a.jsonl", LINE.encode())
    taken, _ = arrived(inbox, ())
    assert arrived(inbox, taken) == ([], {})
    # Renamed, touched, or sent again under another name: the same bytes.
    old.rename(old.with_name("b.jsonl"))
    os.utime(old.with_name("b.jsonl"), (time.time() + 5,) * 2)
    put(inbox, "c.jsonl", LINE.encode())
    assert arrived(inbox, taken) == ([], {})
    # It grew: what is new in it is told by the prompts' ids.
    put(inbox, "b.jsonl", LINE.encode() * 2)
    assert names(arrived(inbox, taken)[0]) == ["b.jsonl"]


def test_a_backlog_is_taken_in_portions(inbox):
    for number in range(5):
        put(inbox, f"{number}.jsonl", LINE.replace("1 +", f"{number} +").encode())
    few = inbox.model_copy(update={"max_files": 2})
    taken: list = []
    for expected in (["0.jsonl", "1.jsonl"], ["2.jsonl", "3.jsonl"], ["4.jsonl"], []):
        found, waiting = arrived(few, taken)
        assert names(found) == expected
        taken += found
    assert waiting == {}


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="create it, or correct the path"):
        check(InboxSource(path=str(tmp_path / "none")))


def test_on_s3_objects_are_whole_when_they_appear(s3_bucket):
    client, inbox = boto3.client("s3"), InboxSource(path=f"s3://{s3_bucket}/drop/", task="maths")
    assert arrived(inbox, ()) == ([], {})
    client.put_object(Bucket=s3_bucket, Key="drop/a.jsonl", Body=LINE.encode())
    client.put_object(Bucket=s3_bucket, Key="drop/sub/b.parquet", Body=parquet())
    client.put_object(Bucket=s3_bucket, Key="dropped/c.jsonl", Body=LINE.encode())
    taken, _ = arrived(inbox, ())
    assert names(taken) == ["a.jsonl", "b.parquet"]
    rows = [row for source in expand(inbox, taken) for row in read(source, "auto")]
    assert len(rows) == 3
    assert {row.source for row in rows} == {"maths"}
    assert arrived(inbox, taken) == ([], {})
    client.put_object(Bucket=s3_bucket, Key="drop/a.jsonl", Body=LINE.encode() * 2)
    assert names(arrived(inbox, taken)[0]) == ["a.jsonl"]

"""Sources of prompts: an iterator of rows in bounded memory, whatever the source's size.

    read(source, verifier)   problems and refused rows, in the source's order
    check(source)            what the plan asks, without reading all: ValueError in one line, else an estimate of rows
    identity(source)         names the content, for fingerprints

A row is refused, with a reason, where it is broken; a source, with a ValueError, where it cannot be meant. The message
names the source; the caller says where in the settings it stands.
"""

import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.metadata import version
from itertools import chain, islice
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from infra.files import content_id, file_size, find_files, open_file
from tasks.child import Unanswered, ask
from tasks.config.prompts import (
    HuggingFaceSource,
    InboxSource,
    JsonlSource,
    ParquetSource,
    PromptSource,
    ReasoningGymSource,
    ReasoningGymTask,
)
from tasks.forms import form_of
from tasks.hub import dataset_commit, read_dataset
from tasks.inbox import arrived, expand
from tasks.rows import Mapper, Refused, Row, refuse

# A longer line is refused; no more of it is held.
LINE_BYTES = 8 << 20
BATCH_ROWS = 256
# The plan looks at this many rows of a file.
CHECK_ROWS = 1000

# What helps where all rows are refused for one reason.
FIXES = {
    "broken_line": "give one JSON object a line",
    "empty_prompt": "set fields.prompt to the column that holds the prompts",
    "malformed": "set fields.prompt to a column of text, or fields.messages to one of {role, content} lists",
    "no_template": "set models.chat_template, or leave prompts.system out",
    "too_long": "raise prompts.max_prompt_tokens",
    "undecodable": "write it as UTF-8",
}

Rows = Iterator[Row | Refused]


def read(source: PromptSource, verifier: str, limit: int | None = None) -> Rows:
    """The rows of a source, or its first ``limit``. ``verifier``: as in the settings. ValueError where the source
    cannot be read, or where a named column is in none of its rows."""
    if isinstance(source, ReasoningGymSource):
        return islice(read_reasoning_gym(source, verifier), limit)
    if isinstance(source, InboxSource):
        return islice(chain.from_iterable(read(file, verifier) for file in whole(source)), limit)
    scope = f" of the first {limit:,}" if limit else ""
    limit = min((rows for rows in (limit, source.limit) if rows), default=None)
    if isinstance(source, JsonlSource):
        return read_jsonl(source, verifier, limit, scope)
    if isinstance(source, ParquetSource):
        return read_parquet(source, verifier, limit, scope)
    return read_dataset(source, verifier, limit, scope)


def identity(source: PromptSource) -> str:
    """Names the source's content: equal text, equal content. Reads local files once. ValueError where missing."""
    match source:
        case ReasoningGymSource():
            return f"reasoning-gym {version('reasoning-gym')}"
        case JsonlSource():
            return content_id(source.path)
        case ParquetSource():
            return " ".join(content_id(file) for file in find_files(source.path, ".parquet"))
        case HuggingFaceSource():
            return dataset_commit(source)
        case InboxSource():
            return " ".join(map(identity, whole(source)))


def whole(source: InboxSource) -> list[JsonlSource | ParquetSource]:
    """An inbox's files as they are now, whoever took them before: a recurring run names its own instead."""
    return expand(source, arrived(source, ())[0])


def check(source: PromptSource) -> int | None:
    """Rows of the source, about; None where only reading tells. ValueError with field, value and fix."""
    if isinstance(source, InboxSource):
        # An empty one is as it should be.
        return sum(check(file) or 0 for file in whole(source))
    if isinstance(source, ReasoningGymSource):
        for task in source.tasks:
            check_task(task, source.seed)
        return sum(task.size for task in source.tasks)
    refuse_useless(source, Counter(getattr(row, "reason", "") for row in read(source, "auto", CHECK_ROWS)))
    match source:
        case JsonlSource():
            rows = estimate_lines(source.path)
        case ParquetSource():
            files = find_files(source.path, ".parquet")
            with open_file(files[0]) as stream:
                rows = pq.ParquetFile(stream).metadata.num_rows * len(files)
        case HuggingFaceSource():
            return source.limit
    return min(rows, source.limit or rows)


def refuse_useless(source: PromptSource, reasons: Counter[str]) -> None:
    """ValueError for a source of which no row was read, or none was usable. ``reasons``: rows by reason, "" is good."""
    place = f"{source.type} {getattr(source, 'path', getattr(source, 'id', ''))!r}"
    if not reasons.total():
        raise ValueError(f"{place} is empty: give a source with rows")
    if not reasons[""]:
        found = [(reason, count) for reason, count in reasons.most_common() if reason]
        counts = ", ".join(f"{reason} {count:,}" for reason, count in found)
        fix = FIXES.get(found[0][0], "correct it")
        raise ValueError(f"{place}: none of {reasons.total():,} rows is usable ({counts}): {fix}")


def check_task(task: ReasoningGymTask, seed: int) -> str:
    """A task's arguments as JSON, after one problem was made with them. ValueError where that fails."""
    place = f"reasoning_gym task {task.name!r}"
    known = ask("reasoning_gym", "options", task.name)
    if known is None or task.name == "composite":
        names = ask("reasoning_gym", "tasks")
        near = get_close_matches(task.name, names, 3) or names
        raise ValueError(f"{place} does not exist or is a mixture; use for example {', '.join(near[:8])}")
    if wrong := [option for option in task.options if option not in known or option in ("size", "seed")]:
        options = ", ".join(option for option in known if option not in ("size", "seed"))
        raise ValueError(f"{place} has no option {wrong[0]!r}; its options are {options}")
    arguments = json.dumps({**task.options, "size": task.size, "seed": seed})
    try:
        ask("reasoning_gym", "problems", task.name, arguments, 0, 1)
    except Unanswered as error:
        raise ValueError(f"{place} refuses its options {task.options}: {error}") from None
    return arguments


def read_reasoning_gym(source: ReasoningGymSource, verifier: str) -> Rows:
    for task in source.tasks:
        arguments, options = check_task(task, source.seed), json.dumps(task.options)
        for start in range(0, task.size, BATCH_ROWS):
            stop = min(start + BATCH_ROWS, task.size)
            problems = ask("reasoning_gym", "problems", task.name, arguments, start, stop)
            for position, problem in enumerate(problems, start):
                entry = {"task": task.name, "options": options, "form": form_of(problem["answer"])}
                yield Row(
                    source=task.name,
                    position=position,
                    messages=[{"role": "user", "content": problem["question"]}],
                    answer=problem["answer"],
                    reference=None,
                    verifier="reasoning_gym" if verifier == "auto" else verifier,
                    entry=json.dumps({**entry, "metadata": problem["metadata"]}),
                )


def lines(stream: BinaryIO, place: str) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line that is not blank, unzipped; of a line beyond LINE_BYTES only its beginning, which
    is longer than LINE_BYTES. ValueError for a damaged gzip file."""
    zipped = stream.read(2) == b"\x1f\x8b"
    stream.seek(0)
    text = cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=stream))) if zipped else stream
    number = -1
    try:
        while line := text.readline(LINE_BYTES + 1):
            number += 1
            rest = line
            while len(rest) > LINE_BYTES and not rest.endswith(b"\n"):
                rest = text.readline(LINE_BYTES + 1)
            if not line.isspace():
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{place!r} is damaged or cut off after {number + 1:,} lines ({error}): fetch it again"
        ) from None


def read_jsonl(source: JsonlSource, verifier: str, limit: int | None, scope: str) -> Rows:
    name = source.task or re.sub(r"(\.jsonl?|\.ndjson)?(\.gz)?$", "", source.path.rpartition("/")[2])
    mapper = Mapper(f"{source.path!r}", name, source.fields, verifier)
    with open_file(source.path) as stream:
        for number, line in islice(lines(stream, source.path), limit):
            yield json_row(mapper, number, line)
    mapper.finish(scope)


def json_row(mapper: Mapper, number: int, line: bytes) -> Row | Refused:
    raw = line.decode("utf-8-sig" if number == 0 else "utf-8", "replace").strip()
    if len(line) > LINE_BYTES:
        return refuse(mapper.name, number, "too_long", raw)
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 0 else "utf-8"))
    except UnicodeDecodeError:
        return refuse(mapper.name, number, "undecodable", raw)
    except (ValueError, RecursionError):
        return refuse(mapper.name, number, "broken_line", raw)
    return mapper(number, row, raw) if isinstance(row, dict) else refuse(mapper.name, number, "broken_line", raw)


def estimate_lines(path: str) -> int:
    """Lines of a file, by the length of its first ones."""
    with open_file(path) as stream:
        read_lines = sum(1 for _ in islice(lines(stream, path), CHECK_ROWS))
        done = stream.tell()
    return read_lines if read_lines < CHECK_ROWS else round(read_lines * file_size(path) / done)


def read_parquet(source: ParquetSource, verifier: str, limit: int | None, scope: str) -> Rows:
    name = source.task or source.path.rstrip("/").rpartition("/")[2].removesuffix(".parquet")
    mapper = Mapper(f"{source.path!r}", name, source.fields, verifier)
    yield from islice(
        (
            refuse(name, position, "undecodable", "") if row is None else mapper(position, row)
            for position, row in enumerate(parquet_rows(source.path, mapper))
        ),
        limit,
    )
    mapper.finish(scope)


def parquet_rows(path: str, mapper: Mapper) -> Iterator[dict[str, Any] | None]:
    """Rows of all files, of the named columns only unless a user's own verifier may want them all; None for a row that
    is not UTF-8. ValueError for a file that is not Parquet, or a first file without a named column."""
    wanted = set(mapper.unseen.values())
    for number, file in enumerate(find_files(path, ".parquet")):
        try:
            with open_file(file) as stream:
                parquet = pq.ParquetFile(stream)
                mapper.meet(parquet.schema_arrow.names)
                if number == 0:
                    mapper.finish()
                chosen = [column for column in parquet.schema_arrow.names if column in wanted]
                columns = None if ":" in mapper.verifier else chosen or None
                for batch in parquet.iter_batches(BATCH_ROWS, columns=columns):
                    yield from batch_rows(batch)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            cause = str(error).partition("\n")[0][:200]
            raise ValueError(f"{file!r} is damaged or not Parquet ({cause}): write it again") from None


def batch_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | None]:
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        # Text that is not UTF-8, or a time that Python has no value for.
        for number in range(batch.num_rows):
            try:
                yield from batch.slice(number, 1).to_pylist()
            except (ValueError, OverflowError):
                yield None

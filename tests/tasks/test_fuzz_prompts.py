"""Prompt files of every wrong kind: each row is read or refused with a reason, or the file is, in one line. No row is
lost, none ends the run."""

import gzip
import io
import json
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from garbage import EXAMPLES, TEXTS, damaged, fuzz, lines, mutated, values
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from test_prompts import tokenizer_folder  # noqa: F401 (a fixture)

from infra.models import load_tokenizer
from tasks.config.prompts import PromptsConfig, PromptSource
from tasks.intake import Intake, Measure
from tasks.sources import LINE_BYTES, check, identity

pytestmark = pytest.mark.timeout(7200 if EXAMPLES else 600)
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
ROWS = [
    {"prompt": "What is 1 + 1?", "answer": "#### 2", "context": "Sums.", "chat": CHAT},
    {"prompt": "Where?", "answer": "Paris", "context": None, "chat": CHAT[:1]},
    {"prompt": 7, "answer": 0.5, "context": ["a", {"b": 1}], "chat": [{"role": "system", "content": "x"}, CHAT[0]]},
]
FIELDS = [
    {},
    {"messages": "chat"},
    {"context": "context", "answer": "answer", "reference": "context", "source": "answer"},
    {"answer": "answer", "answer_pattern": "#### (.+)"},
]
VERIFIERS = ["auto", "json:loads", "number"]


@pytest.fixture(scope="module")
def measure(tokenizer_folder) -> Measure:  # noqa: F811
    return Measure(load_tokenizer(tokenizer_folder), limit=64, template_args={})


def take(measure: Measure, path, data: bytes, kind: str, fields: dict[str, Any], verifier: str) -> int | None:
    """Rows that the prompts stage enters or refuses; None where it refuses the file."""
    path.write_bytes(data)
    source = TypeAdapter(PromptSource).validate_python({"type": kind, "path": str(path), "fields": fields})
    try:
        check(source)
        identity(source)
    except ValueError as error:
        lines([str(error)])
    config = PromptsConfig(sources=[source], verifier=verifier)
    with duckdb.connect() as db:
        intake = Intake(db, config, measure, lambda done, total: None)
        try:
            intake.read_source(source, False, 0)
        except ValueError as error:
            lines([str(error)])
            if "none of" not in str(error):
                return None
        entered = db.execute("SELECT (SELECT count(*) FROM rows) + (SELECT count(*) FROM refused)").fetchone()
    assert entered == (intake.done,)
    return intake.done


def count_lines(data: bytes) -> int:
    return sum(1 for line in data.split(b"\n") if line and not line.isspace())


def jsonl(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


GOOD = jsonl(ROWS)


@fuzz(0.5)
@given(st.lists(mutated(ROWS) | values, max_size=6), st.sampled_from(FIELDS), st.sampled_from(VERIFIERS))
@example([{"chat": [{"role": ["user"], "content": "x"}]}], FIELDS[1], "auto")
@example([{"chat": [{"role": "user", "content": {"a": 1}}]}], FIELDS[1], "auto")
@example([*({"prompt": text, "answer": text, "context": text} for text in TEXTS)], FIELDS[2], "auto")
def test_rows_with_wrong_values(measure, tmp_path_factory, rows, fields, verifier):
    data = jsonl([*rows, *ROWS])
    read = take(measure, tmp_path_factory.getbasetemp() / "rows.jsonl", data, "jsonl", fields, verifier)
    assert read is None or read == len(rows) + len(ROWS)


@fuzz(0.5)
@given(damaged([GOOD, GOOD.decode().encode("utf-16"), gzip.compress(GOOD)]), st.sampled_from(FIELDS))
@example(b'{"prompt": "x", "answer": ' + b"[" * 990 + b"]" * 990 + b"}\n" + GOOD, FIELDS[2])
@example(b"[" * 200_000 + b"\n" + GOOD, FIELDS[0])
@example(b'{"prompt": ' * 200_000 + b"\n" + GOOD, FIELDS[0])
@example(b'{"prompt": "' + b"x" * (LINE_BYTES + 5) + b'"}\n' + GOOD, FIELDS[0])
@example(b'{"prompt": 1' + b"0" * 5000 + b"}\n" + GOOD, FIELDS[0])
@example(b'{"prompt": NaN, "answer": Infinity}\n' + GOOD, FIELDS[2])
@example(b'{"prompt": "\\u0000 \\u001b[2J", "answer": "\\ud800"}\n' + GOOD, FIELDS[2])
@example(b"\0" * 1000 + b"\n" + GOOD, FIELDS[0])
@example(b"\r\n\r\n" + GOOD.replace(b"\n", b"\r\n"), FIELDS[0])
@example(gzip.compress(gzip.compress(GOOD)), FIELDS[0])
@example(b"\x1f\x8b", FIELDS[0])
def test_files_that_were_damaged(measure, tmp_path_factory, data, fields):
    read = take(measure, tmp_path_factory.getbasetemp() / "rows.jsonl", data, "jsonl", fields, "auto")
    if read is not None and not data.startswith(b"\x1f\x8b"):
        assert read == count_lines(data)


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=100)
    return sink.getvalue()


MANY = pa.table({"prompt": [f"What is {n}?" for n in range(250)], "answer": [str(n) for n in range(250)]})


@fuzz(0.5)
@given(damaged([parquet(MANY), parquet(MANY.slice(0, 3))]), st.sampled_from([FIELDS[0], FIELDS[2]]))
@example(parquet(MANY)[:-20], FIELDS[0])
@example(b"PAR1" * 2, FIELDS[0])
@example(parquet(MANY), FIELDS[0])
@example(parquet(MANY), FIELDS[2])
def test_parquet_that_was_damaged(measure, tmp_path_factory, data, fields):
    read = take(measure, tmp_path_factory.getbasetemp() / "rows.parquet", data, "parquet", fields, "auto")
    assert read is None or read <= 250
    if data in (parquet(MANY), parquet(MANY.slice(0, 3))):
        # The other fields name columns that it has not.
        assert read in ((250, 3) if fields == FIELDS[0] else (None,))


TYPES = [
    pa.string(),
    pa.large_string(),
    pa.binary(),
    pa.int64(),
    pa.float64(),
    pa.bool_(),
    pa.timestamp("ns"),
    pa.timestamp("us"),
    pa.date32(),
    pa.duration("us"),
    pa.decimal128(20, 3),
    pa.list_(pa.string()),
    pa.struct([("a", pa.string())]),
    pa.map_(pa.string(), pa.int64()),
    pa.null(),
]


def column(kind: pa.DataType) -> pa.Array:
    """Three rows of a type, with values at its ends."""
    if pa.types.is_temporal(kind):
        ends = pa.array(
            [2**31 - 1 if kind == pa.date32() else 2**62, 1, None], pa.int32() if kind == pa.date32() else pa.int64()
        )
        return ends.view(kind)
    if pa.types.is_string(kind):
        return pa.array([b"\xff\xfe", b"fine", None]).view(kind)
    samples = {"decimal128(20, 3)": "1", "list<item: string>": ["a"], "struct<a: string>": {"a": "x"}}
    samples |= {
        "map<string, int64>": [("a", 1)],
        "bool": True,
        "null": None,
        "int64": 2**63 - 1,
        "double": float("nan"),
    }
    sample: Any = samples.get(str(kind), b"\xff" if pa.types.is_binary(kind) else "x")
    if pa.types.is_decimal(kind):
        import decimal

        sample = decimal.Decimal(sample)
    return pa.array([sample, None, sample], kind)


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize(
    "fields", [FIELDS[0], {"prompt": "other", "answer": "prompt", "source": "prompt"}], ids=["prompt", "answer"]
)
@pytest.mark.parametrize("verifier", ["auto", "json:loads"])
def test_columns_of_every_type(measure, tmp_path, kind, fields, verifier):
    data = parquet(pa.table({"prompt": column(kind), "other": ["a", "b", "c"]}))
    assert take(measure, tmp_path / "rows.parquet", data, "parquet", fields, verifier) == 3

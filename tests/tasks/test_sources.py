import gzip
import json

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto import mock_aws
from pydantic import TypeAdapter, ValidationError

from tasks import sources
from tasks.child import Child, ask
from tasks.config.prompts import PromptSource
from tasks.rows import Refused, Row
from tasks.sources import check, identity, read

PROBLEMS = [{"question": f"What is {n} + 1?", "answer": f"{n} and 1.\n#### {n + 1}"} for n in range(5)]
GSM8K = {"prompt": "question", "answer": "answer", "answer_pattern": "#### (.+)", "reference": "answer"}


def source(**settings):
    return TypeAdapter(PromptSource).validate_python(settings)


def jsonl(path, fields=None, **settings):
    return source(type="jsonl", path=str(path), fields=fields or {}, **settings)


def write_lines(path, rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def reasons(rows):
    return [row.reason if isinstance(row, Refused) else "" for row in rows]


def said(row):
    return [(turn["role"], turn["content"]) for turn in row.messages]


@pytest.mark.parametrize("name", ["math.jsonl", "math.jsonl.gz"])
def test_jsonl(tmp_path, name):
    path = write_lines(tmp_path / name, PROBLEMS)
    rows = list(read(jsonl(path, GSM8K), "auto"))
    assert rows[3] == Row(
        source="math",
        position=3,
        messages=[{"role": "user", "content": "What is 3 + 1?"}],
        answer="4",
        reference="3 and 1.\n#### 4",
        verifier="number",
        entry=None,
    )
    assert len(rows) == check(jsonl(path, GSM8K)) == 5
    assert len(list(read(jsonl(path, GSM8K, limit=2), "auto"))) == check(jsonl(path, GSM8K, limit=2)) == 2


def test_broken_lines_are_refused_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LINE_BYTES", 1000)
    path = write_lines(
        tmp_path / "mixed.jsonl",
        [
            b'\xef\xbb\xbf{"prompt": "with a byte order mark"}',
            b"{not json",
            b"",
            b'{"prompt": "\xff\xfe"}',
            b'{"prompt": "' + b"x" * 5000 + b'"}',
            b"[" * 900,
            b"[1, 2]",
            {"prompt": "half a pair \ud83d"},
            {"prompt": " \n"},
            {"prompt": None},
            {"prompt": {"a": 1}},
            {"other": "x"},
            {"prompt": 7},
            {"prompt": "good"},
        ],
    )
    rows = list(read(jsonl(path), "auto"))
    assert reasons(rows) == [
        "",
        "broken_line",
        "undecodable",
        "too_long",
        "broken_line",
        "broken_line",
        "undecodable",
        "empty_prompt",
        "empty_prompt",
        "malformed",
        "missing_field",
        "",
        "",
    ]
    # The blank line has a number, but is no row.
    assert [row.position for row in rows] == [0, 1, *range(3, 14)]
    assert said(rows[-2]) == [("user", "7")]
    assert all(len(row.raw) <= 10_000 and row.raw.encode() for row in rows if isinstance(row, Refused))


def test_a_line_of_many_megabytes_is_not_held(tmp_path):
    path = tmp_path / "long.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"prompt": "' + b"x" * (40 << 20) + b'"}\n{"prompt": "good"}\n')
    assert reasons(read(jsonl(path), "auto")) == ["too_long", ""]


def test_context_and_types(tmp_path):
    path = write_lines(
        tmp_path / "dolly.jsonl",
        [
            {"instruction": "Sum up.", "context": "A long story.", "response": "Short.", "category": "sum", "key": 4.5},
            {"instruction": "Who?", "context": "", "response": "", "category": None, "key": ["a"]},
        ],
    )
    fields = {"prompt": "instruction", "context": "context", "reference": "response", "source": "category"}
    first, second = read(jsonl(path, {**fields, "answer": "key"}), "auto")
    assert said(first) == [("user", "Sum up.\n\nA long story.")]
    assert (first.source, first.answer, first.reference, first.verifier) == ("sum", "4.5", "Short.", "number")
    assert said(second) == [("user", "Who?")]
    assert (second.source, second.answer, second.reference) == ("dolly", '["a"]', None)


def test_messages(tmp_path):
    user, model = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    conversations = [
        [user],
        [{"role": "system", "content": "S"}, user, model],
        [user, model, parts],
        [image],
        [model],
        [],
        "Hi",
        [{"role": "robot", "content": "x"}],
        [user, {"role": "system", "content": "late"}],
    ]
    path = write_lines(tmp_path / "chat.jsonl", [{"chat": chat} for chat in conversations])
    rows = list(read(jsonl(path, {"messages": "chat"}), "auto"))
    assert reasons(rows) == ["", "", "", "malformed", "empty_prompt", "empty_prompt", *["malformed"] * 3]
    assert said(rows[1]) == [("system", "S"), ("user", "Hi")]
    assert rows[1].reference == "Hello"
    assert said(rows[2])[-1] == ("user", "a\nb")


def test_own_verifiers_are_given_the_whole_row(tmp_path):
    path = write_lines(tmp_path / "code.jsonl", [{"prompt": "Write f", "tests": ["f(1) == 2"]}])
    (row,) = read(jsonl(path), "my_checks:run")
    assert row.verifier == "my_checks:run"
    assert json.loads(row.entry)["tests"] == ["f(1) == 2"]


@pytest.mark.parametrize(
    ("rows", "fields", "complaint"),
    [
        (PROBLEMS, {}, "'prompt' of fields.prompt; set fields.prompt to one of 'question', 'answer'"),
        (PROBLEMS, {**GSM8K, "context": "story"}, "'story' of fields.context"),
        (PROBLEMS, {**GSM8K, "answer_pattern": "=> (.+)"}, "matches no row"),
        ([], {}, "is empty"),
        ([b"", b" "], {}, "is empty"),
        ([b"a,b", b"1,2"], {}, "broken_line 2.*one JSON object a line"),
        ([b'\xff"'], {}, "UTF-8"),
    ],
)
def test_sources_that_cannot_be_meant(tmp_path, rows, fields, complaint):
    path = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=complaint) as error:
        check(jsonl(path, fields))
    assert "\n" not in str(error.value)


def test_a_field_missing_at_last_is_said_after_reading(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", PROBLEMS)
    with pytest.raises(ValueError, match="no row has the column 'prompt'"):
        list(read(jsonl(path), "auto"))


def test_files_that_are_not_there(tmp_path):
    for bad in (jsonl(tmp_path / "no.jsonl"), jsonl(tmp_path), source(type="parquet", path=str(tmp_path))):
        for look in (check, identity):
            with pytest.raises(ValueError, match=str(tmp_path)) as error:
                look(bad)
            assert "\n" not in str(error.value)


def test_a_gzip_file_cut_off(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl.gz", [{"prompt": f"{n} {n * n}"} for n in range(5000)])
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="damaged or cut off after"):
        list(read(jsonl(path), "auto"))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"answer": "a", "answer_pattern": "("}, "no pattern"),
        ({"answer": "a", "answer_pattern": "x"}, "0 groups"),
        ({"answer_pattern": "(x)"}, "needs fields.answer"),
        ({"prompt": None}, "neither"),
    ],
)
def test_fields(fields, complaint):
    with pytest.raises(ValidationError, match=complaint):
        jsonl("x.jsonl", fields)


def test_identity_follows_the_content(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", PROBLEMS)
    before = identity(jsonl(path))
    other = write_lines(tmp_path / "same.jsonl", PROBLEMS)
    assert identity(jsonl(other)) == before
    write_lines(path, PROBLEMS[:-1])
    assert identity(jsonl(path)) != before


def parquet_folder(folder):
    folder.mkdir()
    for part in range(2):
        rows = [{"prompt": f"p{part}{n}", "chat": [{"role": "user", "content": "x"}], "unused": n} for n in range(300)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{part}.parquet", row_group_size=100)
    (folder / "_SUCCESS.parquet").write_bytes(b"")
    return source(type="parquet", path=str(folder))


def test_parquet(tmp_path):
    folder = parquet_folder(tmp_path / "set")
    rows = list(read(folder, "auto"))
    assert [row.position for row in rows] == list(range(600))
    assert len(rows) == check(folder)
    assert (rows[-1].messages[0]["content"], rows[-1].source) == ("p1299", "set")
    chats = read(
        folder.model_copy(update={"limit": 3, "fields": folder.fields.model_copy(update={"messages": "chat"})}), "auto"
    )
    assert [said(row) for row in chats] == [[("user", "x")]] * 3
    with pytest.raises(ValueError, match="one of 'prompt', 'chat', 'unused'"):
        check(source(type="parquet", path=folder.path, fields={"prompt": "text"}))


def test_parquet_that_is_not_utf8_or_damaged(tmp_path):
    text = pa.array([b"good", b"\xff\xfe", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"prompt": text}), tmp_path / "a.parquet")
    assert reasons(read(source(type="parquet", path=str(tmp_path / "a.parquet")), "auto")) == ["", "undecodable", ""]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="damaged or not Parquet"):
        check(source(type="parquet", path=str(tmp_path / "b.parquet")))


@pytest.fixture
def bucket(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        client = boto3.client("s3")
        client.create_bucket(Bucket="data")
        yield client


def test_s3(tmp_path, bucket):
    gz = write_lines(tmp_path / "rows.jsonl.gz", PROBLEMS)
    bucket.upload_file(str(gz), "data", "in/rows.jsonl.gz")
    there, here = jsonl("s3://data/in/rows.jsonl.gz", GSM8K), jsonl(gz, GSM8K)
    assert list(read(there, "auto")) == list(read(here, "auto"))
    assert check(there) == 5
    before = identity(there)
    bucket.put_object(Bucket="data", Key="in/rows.jsonl.gz", Body=gzip.compress(b"{}"))
    assert identity(there) != before

    folder = parquet_folder(tmp_path / "set")
    for file in (tmp_path / "set").iterdir():
        bucket.upload_file(str(file), "data", f"set/{file.name}")
    away = folder.model_copy(update={"path": "s3://data/set"})
    assert list(read(away, "auto")) == list(read(folder, "auto"))

    for path in ("s3://data/none.jsonl", "s3://nowhere/x.jsonl"):
        with pytest.raises(ValueError, match=r"cannot be read.*correct the address"):
            check(jsonl(path))


def gym(*tasks, seed=1):
    return source(type="reasoning_gym", tasks=list(tasks), seed=seed)


def test_reasoning_gym():
    two = gym(
        {"name": "chain_sum", "size": 300, "options": {"min_terms": 2, "max_terms": 2}}, {"name": "gcd", "size": 4}
    )
    rows = list(read(two, "auto"))
    assert len(rows) == check(two) == 304
    assert [row.source for row in rows[298:302]] == ["chain_sum", "chain_sum", "gcd", "gcd"]
    assert rows == list(read(two, "auto"))
    assert rows[:4] != list(read(gym({"name": "chain_sum", "size": 4}, seed=2), "auto"))
    assert {row.verifier for row in rows} == {"reasoning_gym"}
    entry = json.loads(rows[0].entry)
    assert (entry["task"], json.loads(entry["options"]), entry["form"]) == (
        "chain_sum",
        {"min_terms": 2, "max_terms": 2},
        "number",
    )
    assert len(list(read(two, "number", 3))) == 3
    assert identity(two).startswith("reasoning-gym 0.")


def test_reasoning_gym_is_the_same_in_every_process():
    # This task's words come out of sets, whose order follows the process's hash seed unless that is fixed.
    request = ["word_ladder", json.dumps({"size": 4, "seed": 1}), 0, 4]
    assert ask("reasoning_gym", "problems", *request) == Child("reasoning_gym").ask("problems", request)


@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        ({"name": "chainsum", "size": 1}, "does not exist.*chain_sum"),
        ({"name": "composite", "size": 1}, "mixture"),
        ({"name": "chain_sum", "size": 1, "options": {"terms": 1}}, "no option 'terms'.*min_terms"),
        ({"name": "chain_sum", "size": 1, "options": {"seed": 1}}, "no option 'seed'"),
        ({"name": "chain_sum", "size": 1, "options": {"min_terms": "two"}}, "refuses its options"),
        ({"name": "chain_sum", "size": 1, "options": {"min_terms": 0}}, "must be positive"),
    ],
)
def test_reasoning_gym_mistakes(task, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        check(gym(task))
    assert "\n" not in str(error.value)


def test_huggingface(tmp_path, monkeypatch):
    write_lines(tmp_path / "train.jsonl", PROBLEMS)
    local = source(type="huggingface", id=str(tmp_path), fields=GSM8K, limit=4)
    rows = list(read(local, "auto"))
    assert [row.answer for row in rows] == ["1", "2", "3", "4"]
    assert check(local) == 4
    assert identity(local).startswith("sha256:")
    with pytest.raises(ValueError, match="split 'test'"):
        check(local.model_copy(update={"split": "test"}))

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for look in (check, identity):
        with pytest.raises(ValueError, match=r"openai/gsm8k.*cannot be read") as error:
            look(source(type="huggingface", id="openai/gsm8k"))
        assert "\n" not in str(error.value)

import json
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from infra.files import content_id
from infra.manifest import Manifest, commit_manifest, load_manifest
from infra.models import ModelRef
from infra.parts import read_rows
from infra.store import open_store
from tasks import dedupe, prompts, schemas
from tasks.dedupe import band_width, content_hash, jaccard, shingles
from tasks.prompts import PromptsSettings
from tasks.stage import Stage, StageSpec
from tasks.verify import is_correct

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('refused') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TABLES = ("prompts", "warmup", "candidates", "heldout")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A real tokenizer: every byte is a token, so a text has as many tokens as bytes."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({sign: n for n, sign in enumerate(alphabet)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


class Runs:
    """Runs the stage in this process, in a store of its own."""

    def __init__(self, tmp_path, tokenizer_folder):
        self.root = tmp_path / "store"
        self.tmp_path = tmp_path
        model = ModelRef(name="tiny", revision="r1", id=str(tokenizer_folder))
        facts = {"models": {"teacher": model.model_dump()}}
        self.models = commit_manifest(
            open_store(str(self.root)),
            Manifest(
                stage="models",
                module="tasks.models",
                version=1,
                fingerprint="0" * 16,
                settings={},
                inputs={},
                facts=facts,
            ),
        )

    def file(self, name, rows):
        path = self.tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"type": "jsonl", "path": str(path)}

    def spec(self, *sources, warmup=2, seed=0, candidates=None, queries=1, after=None, identities=(), **settings):
        near = {"enabled": False} | settings.pop("near_duplicates", {})
        config = {"sources": list(sources), "heldout": 3, "near_duplicates": near, **settings}
        draws = {"warmup": warmup, "seed": seed, "candidates": candidates, "queries": queries}
        if after is not None:
            draws["after"] = {"least": 2, "earlier": [f"earlier-{n}" for n in range(len(after))]}
        earlier = {f"earlier-{n}": stage.spec.manifest_path for n, stage in enumerate(after or ())}
        return StageSpec(
            stage="prompts",
            module="tasks.prompts",
            settings={"prompts": config, "identities": list(identities), **draws},
            inputs={"models": self.models.path, **earlier},
            root=str(self.root),
        )

    def __call__(self, *sources, **settings):
        spec = self.spec(*sources, **settings)
        stage = Stage(spec, PromptsSettings.model_validate(spec.settings))
        prompts.run(stage)
        commit_manifest(stage.store, stage.manifest)
        return stage

    def rows(self, stage, table):
        return read_rows(stage.store, load_manifest(stage.store, stage.spec.manifest_path), table).to_pylist()

    def ids(self, stage, table):
        return [row["prompt_id"] for row in self.rows(stage, table)]


@pytest.fixture
def runs(tmp_path, tokenizer_folder):
    return Runs(tmp_path, tokenizer_folder)


def problems(count, start=0):
    return [{"prompt": f"What is {n} times {n}?"} for n in range(start, start + count)]


def test_tables_and_counts(runs):
    stage = runs(runs.file("squares.jsonl", problems(20)), warmup=4, candidates=6)
    manifest = load_manifest(stage.store, stage.spec.manifest_path)
    assert all(manifest.tables[table].arrow_schema == schemas.PROMPT for table in TABLES)
    assert manifest.tables["quarantine"].arrow_schema == schemas.QUARANTINE
    ids = {table: set(runs.ids(stage, table)) for table in TABLES}
    assert {table: len(ids[table]) for table in TABLES} == {"prompts": 17, "warmup": 4, "candidates": 6, "heldout": 3}
    assert not ids["prompts"] & ids["heldout"]
    assert ids["warmup"] | ids["candidates"] < ids["prompts"]
    assert not ids["warmup"] & ids["candidates"]
    undrawn = runs.rows(stage, "undrawn")
    assert {row["prompt_id"] for row in undrawn} == ids["prompts"] - ids["warmup"] - ids["candidates"]
    assert {(row["source"], row["reason"]) for row in undrawn} == {("squares", "not_a_candidate")}
    counts = stage.facts["counts"]
    assert (counts["read"], counts["prompts"], counts["heldout"], counts["reasons"]) == (20, 17, 3, {})
    assert counts["sources"] == {"squares": {"read": 20, "prompts": 17, "heldout": 3, "refused": 0}}
    # <user> and <assistant> around the question, a token a byte.
    assert stage.facts["prompt_tokens"]["max"] == len("<user>What is 19 times 19?<assistant>")


def test_draws_follow_the_seed_and_not_the_order(runs):
    first = runs(runs.file("a.jsonl", problems(30)))
    turned = runs(runs.file("b.jsonl", reversed(problems(30))))
    other = runs(runs.file("a.jsonl", problems(30)), seed=1)
    for table in ("heldout", "warmup", "candidates"):
        assert set(runs.ids(first, table)) == set(runs.ids(turned, table))
        assert set(runs.ids(first, table)) != set(runs.ids(other, table))


def test_a_later_run_takes_only_what_no_run_took(runs):
    first = runs(runs.file("a.jsonl", problems(20)), after=[], heldout=10)
    # The file grew, and another one repeats it in part.
    sources = [runs.file("a.jsonl", problems(30)), runs.file("b.jsonl", problems(25, start=10))]
    second = runs(*sources, after=[first], heldout=10)
    old = {*runs.ids(first, "prompts"), *runs.ids(first, "heldout")}
    fresh = {*runs.ids(second, "prompts"), *runs.ids(second, "heldout")} - set(runs.ids(first, "heldout"))
    assert len(old) == 20
    assert len(fresh) == 15
    assert not fresh & old
    counts = second.facts["counts"]
    assert (counts["read"], counts["taken_before"], counts["reasons"]) == (55, 30, {"duplicate": 10})


def test_a_share_of_the_held_out_prompts_is_renewed(runs):
    stages = []
    for week in range(4):
        stages.append(runs(runs.file(f"{week}.jsonl", problems(20, start=20 * week)), after=stages, heldout=10))
    heldout = [set(runs.ids(stage, "heldout")) for stage in stages]
    assert [len(ids) for ids in heldout] == [10] * 4
    assert [len(before & after) for before, after in pairwise(heldout)] == [8] * 3
    assert [stage.facts["counts"]["heldout_before"] for stage in stages] == [0, 8, 8, 8]
    # What was ever held out is never learnt from.
    learnt = {name for stage in stages for name in runs.ids(stage, "prompts")}
    assert not learnt & set.union(*heldout)


def test_held_out_rows_are_renewed_whole_and_near_to_none(runs):
    first = runs(runs.file("a.jsonl", problems(8)), after=[], heldout=5, system="Be brief.")
    kept = {row["prompt_id"]: row for row in runs.rows(first, "heldout")}
    text = [row["messages"][-1]["content"] for row in kept.values()]
    twins = [{"prompt": said.replace("What is", "Well then, what is")} for said in text]
    near = {"enabled": True, "threshold": 0.3}
    new = [{"prompt": f"Name {n} {word}s of {word}land"} for n, word in enumerate("abcdefgh")]
    second = runs(runs.file("b.jsonl", [*twins, *new]), after=[first], heldout=5, near_duplicates=near)
    again = [row for row in runs.rows(second, "heldout") if row["prompt_id"] in kept]
    assert len(again) == 4
    assert all(row == kept[row["prompt_id"]] for row in again)
    assert second.facts["counts"]["reasons"]["in_heldout"] >= 4


def test_too_few_new_prompts_wait_and_are_taken_later(runs):
    first = runs(runs.file("a.jsonl", problems(20)), after=[], heldout=10)
    waits = runs(runs.file("b.jsonl", problems(3, start=20)), after=[first], heldout=10)
    assert waits.facts["waits"] == "3 new prompts, 2 of them to hold out"
    assert not waits.manifest.tables
    later = runs(runs.file("c.jsonl", problems(6, start=20)), after=[first], heldout=10)
    assert len(runs.ids(later, "prompts")) == 4


def test_fewer_prompts_than_queries_lower_the_warm_up(runs):
    stage = runs(runs.file("a.jsonl", problems(23)), after=[], heldout=3, warmup=20, queries=100)
    assert (len(runs.ids(stage, "warmup")), len(runs.ids(stage, "candidates"))) == (4, 16)
    with pytest.raises(ValueError, match="100 queries need as many prompts"):
        runs(runs.file("a.jsonl", problems(23)), heldout=3, warmup=20, queries=100)


def test_a_file_that_changed_since_it_was_named_is_not_taken(runs):
    source = runs.file("a.jsonl", problems(20))
    named = content_id(source["path"])
    runs(source, identities=[named])
    runs.file("a.jsonl", problems(21))
    with pytest.raises(ValueError, match="changed while the run began"):
        runs(source, identities=[named], seed=1)


def test_refusals(runs):
    path = runs.tmp_path / "mixed.jsonl"
    lines = [json.dumps(row) for row in problems(10)]
    lines += [
        "{broken",
        '{"prompt": ""}',
        '{"prompt": "%s"}' % ("word " * 60),
        '{"prompt": "%s"}' % ("é" * 60),
        '{"prompt": "half \\ud83d"}',
        '{"question": "?"}',
        '{"prompt": "no"}',
        '{"prompt": " What  is\\n3 times 3? "}',
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    stage = runs({"type": "jsonl", "path": str(path)}, max_prompt_tokens=100)
    reasons = ["broken_line", "empty_prompt", "too_long", "too_long", "undecodable"]
    reasons += ["missing_field", "no_template", "duplicate"]
    refused = runs.rows(stage, "quarantine")
    assert stage.facts["quarantined"] == len(refused) > 0
    assert [row["reason"] for row in refused] == reasons
    assert [row["position"] for row in refused] == list(range(10, 18))
    assert refused[0]["raw"] == "{broken"
    assert "What  is" in refused[-1]["raw"]
    assert stage.facts["counts"]["reasons"] == dict(Counter(reasons))
    assert stage.facts["counts"]["read"] == 18


def test_the_system_prompt_is_put_first_and_counts(runs):
    chat = [{"role": "system", "content": "own"}, {"role": "user", "content": "Hi"}]
    own = runs.file("chat.jsonl", [{"chat": chat}]) | {"fields": {"messages": "chat"}}
    stage = runs(runs.file("a.jsonl", problems(5)), own, heldout=2, system="Be brief.")
    rows = runs.rows(stage, "prompts") + runs.rows(stage, "heldout")
    systems = Counter(row["messages"][0]["content"] for row in rows if row["messages"][0]["role"] == "system")
    assert systems == {"Be brief.": 5, "own": 1}
    plain = runs(runs.file("a.jsonl", problems(5)), heldout=2)
    assert not set(runs.ids(stage, "prompts")) & set(runs.ids(plain, "prompts"))


def test_content_hash():
    composed, decomposed = (
        [{"role": "user", "content": "caf\u00e9 au  lait"}],
        [{"role": "user", "content": "cafe\u0301 au lait\n"}],
    )
    assert content_hash(composed) == content_hash(decomposed)
    assert len(content_hash(composed)) == 16
    assert content_hash(composed) != content_hash([{"role": "system", "content": "caf\u00e9 au  lait"}])


LONG = (
    "A farmer has {} cows and sells some of them at the market every week until there is nothing left to be sold at all"
)


def test_near_duplicates(runs):
    texts = [LONG.format("twelve"), *(row["prompt"] for row in problems(6)), LONG.format("twelve").upper() + "!"]
    source = runs.file("near.jsonl", [{"prompt": text} for text in texts])
    stage = runs(source, near_duplicates={"enabled": True, "threshold": 0.9})
    (refused,) = runs.rows(stage, "quarantine")
    assert (refused["reason"], refused["position"]) == ("near_duplicate", 7)
    # Numbers make another problem, and a higher threshold another verdict.
    assert len(runs.ids(runs(source, near_duplicates={"enabled": True, "threshold": 1.0}), "prompts")) == 5
    assert len(runs.ids(runs(source), "prompts")) == 5


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 0.99, 1.0])
def test_bands_miss_few_pairs(threshold):
    width = band_width(threshold)
    assert (1 - threshold**width) ** (dedupe.PERMUTATIONS // width) <= dedupe.MISSED


def test_near_duplicates_are_those_of_all_pairs(runs):
    """Against the plain comparison of every row with every earlier one."""
    generator = random.Random(0)
    bases = [[f"w{generator.randrange(500)}" for _ in range(60)] for _ in range(12)]
    texts = []
    for _ in range(150):
        words = list(generator.choice(bases))
        for _ in range(generator.randrange(4)):
            words[generator.randrange(60)] = f"w{generator.randrange(500)}"
        texts.append(" ".join([*words, str(len(texts))]))
    stage = runs(
        runs.file("t.jsonl", [{"prompt": t} for t in texts]),
        heldout=2,
        near_duplicates={"enabled": True},
        max_prompt_tokens=1000,
    )
    grams = [shingles([{"role": "user", "content": text}]) for text in texts]
    near = {n for n in range(len(texts)) if any(jaccard(grams[n], earlier) >= 0.9 for earlier in grams[:n])}
    assert 10 < len(near) < 140
    assert {row["position"] for row in runs.rows(stage, "quarantine")} == near


def test_shingles():
    assert shingles([{"role": "user", "content": "One, two"}]) == {b"one , two"}
    assert shingles([{"role": "user", "content": "hi"}]) == {b"hi"}
    assert len(shingles([{"role": "user", "content": "日本語です"}])) == 3
    asked = [{"role": "user", "content": "a b c"}]
    assert shingles([{"role": "system", "content": "x y z"}, *asked]) == shingles(asked)


def test_given_held_out_rows_leave_the_training_set(runs):
    heldout = runs.file("test.jsonl", [*problems(5, 100), {"prompt": LONG.format("7")}, *problems(1, 100)])
    train = runs.file("train.jsonl", [*problems(10), *problems(2, 100), {"prompt": LONG.format("7") + " !"}])
    stage = runs(train, heldout_sources=[heldout], heldout=4, near_duplicates={"enabled": True})
    counts = stage.facts["counts"]
    assert counts["reasons"] == {"in_heldout": 3, "duplicate": 1}
    assert (counts["prompts"], counts["heldout"], counts["heldout_unused"]) == (10, 4, 2)
    assert {row["source"] for row in runs.rows(stage, "heldout")} == {"test"}
    left = [row for row in runs.rows(stage, "undrawn") if row["reason"] == "not_held_out"]
    assert [row["source"] for row in left] == ["test", "test"]
    assert not {row["prompt_id"] for row in left} & set(runs.ids(stage, "heldout"))
    assert {row["source"] for row in runs.rows(stage, "prompts")} == {"train"}


def test_parts_are_bounded(runs, monkeypatch):
    monkeypatch.setattr(prompts, "PART_ROWS", 2048)
    stage = runs(runs.file("many.jsonl", problems(5000)))
    parts = load_manifest(stage.store, stage.spec.manifest_path).tables["prompts"].parts
    assert [part.rows for part in parts] == [2048, 2048, 901]
    positions = [row["messages"][0]["content"] for row in runs.rows(stage, "prompts")]
    assert positions == sorted(positions, key=lambda text: int(text.split()[2]))


def test_a_stage_that_died_goes_on(runs, monkeypatch):
    source = runs.file("a.jsonl", problems(40))
    spec = runs.spec(source)
    stage = Stage(spec, PromptsSettings.model_validate(spec.settings))

    def die(table, schema):
        if table == "warmup":
            raise KeyboardInterrupt
        Stage.close_table(stage, table, schema)

    monkeypatch.setattr(stage, "close_table", die)
    with pytest.raises(KeyboardInterrupt):
        prompts.run(stage)
    before = {table: stage.done(table) for table in TABLES}
    assert before["prompts"]
    finished = runs(source)
    assert {table: finished.done(table) for table in before if before[table]} == {t: p for t, p in before.items() if p}


@pytest.mark.parametrize(
    ("rows", "settings", "complaint"),
    [
        ([], {}, r"prompts\.sources\.0: .*is empty"),
        ([{"prompt": ""}] * 3, {}, r"none of 3 rows is usable \(empty_prompt 3\)"),
        ([{"prompt": "long " * 99}] * 3, {}, r"too_long 3.*max_prompt_tokens"),
        (problems(3), {}, r"prompts\.heldout: 3 held-out prompts leave none of 3"),
        (problems(10), {"warmup": 8}, r"budget\.queries: 8 queries .*but 7 are there.*lower"),
        (problems(10), {"verifier": "nowhere:check"}, r"prompts\.verifier.*nowhere"),
    ],
)
def test_mistakes_are_said_in_one_line(runs, rows, settings, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        runs(runs.file("rows.jsonl", rows), max_prompt_tokens=100, **settings)
    assert "\n" not in str(error.value)


def test_too_few_held_out_rows(runs):
    with pytest.raises(ValueError, match=r"prompts\.heldout: 3 asked for.*hold 2 usable"):
        runs(runs.file("a.jsonl", problems(9)), heldout_sources=[runs.file("h.jsonl", problems(2, 50))])


def test_reasoning_gym(runs):
    tasks = [{"name": "chain_sum", "size": 40, "options": {"min_terms": 2, "max_terms": 2}}, {"name": "gcd", "size": 5}]
    stage = runs({"type": "reasoning_gym", "tasks": tasks, "seed": 3})
    rows = runs.rows(stage, "prompts")
    assert {row["verifier"] for row in rows} == {"reasoning_gym"}
    assert all(is_correct(row["verifier"], f"It is {row['answer']}.", row["answer"], row["entry"]) for row in rows)
    assert not any(is_correct(row["verifier"], "It is 31337.", row["answer"], row["entry"]) for row in rows)


def test_entry_point(runs, tmp_path):
    spec = runs.spec(runs.file("a.jsonl", problems(10)))
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    command = [sys.executable, "-m", "tasks.prompts", "--spec", str(tmp_path / "spec.json")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout.strip().endswith("manifest.json")
    assert load_manifest(open_store(spec.root), spec.manifest_path).tables["prompts"].rows == 7

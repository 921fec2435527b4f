"""A teacher behind an endpoint: vLLM's own OpenAI server, and a proxy before it that fails on request."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import served
import tiny
from annotation import Annotation

from flows.plan import plan_run
from flows.reach import reach
from infra.endpoint import Endpoint, longest
from infra.manifest import commit_manifest
from infra.models import ModelRef
from infra.parts import read_rows
from tasks.config import RunConfig
from tasks.config.models import OpenAIModel
from tasks.connection import connected
from tasks.sample import sample_id
from tasks.stage import Runtime

KEY_VARIABLE = "SWITCHYARD_TEST_KEY"
QUESTION = [{"role": "user", "content": "What is 2 + 3?"}]
LIMITS = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 8}

# Loading vLLM's server takes longer than all of these.
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


class Served(NamedTuple):
    folder: Path
    url: str
    proxy: served.Proxy

    def settings(self, **service: Any) -> dict[str, Any]:
        quick = {"concurrency": 4, "timeout_seconds": 60, "tries": 3, **service}
        source = {"type": "openai", "model": served.NAME, "base_url": self.url, "key_variable": KEY_VARIABLE}
        return {**source, "service": quick}

    def endpoint(self, **service: Any) -> Endpoint:
        plain = OpenAIModel.model_validate(self.settings(**service)).model_dump(mode="json", exclude={"type"})
        student = ModelRef(name="student", revision="1", id=str(self.folder / "teacher"))
        own = plain.pop("service")
        return Endpoint({**plain, **own, "root": str(self.folder), "tokenizer": student.model_dump()})

    def ask(self, prompts: int, spare: int = 0, service: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        seeds = [[number] for number in range(prompts)]
        return (
            self.endpoint(**(service or {}))
            .generate({}, [QUESTION] * prompts, seeds, spare=spare, **LIMITS)
            .to_pylist()
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    tiny.save_model(folder / "teacher", seed=1)
    os.environ[KEY_VARIABLE] = served.KEY
    try:
        with (
            served.vllm_server(folder / "teacher", folder / "vllm.log") as target,
            served.faulty(target) as (url, proxy),
        ):
            yield Served(folder, url, proxy)
    finally:
        del os.environ[KEY_VARIABLE]


@pytest.fixture(scope="module")
def cluster(server: Served) -> Iterator[None]:
    """Ray for the stages of this module, started once the key is in the environment that its actors inherit."""
    with connected(Runtime()):
        yield


@pytest.fixture(autouse=True)
def fresh(server: Served) -> None:
    server.proxy.reset()


def test_answers_come_in_the_students_tokens_with_what_they_cost(server: Served) -> None:
    rows = server.ask(3)
    assert [row["conversation"] for row in rows] == [0, 1, 2]
    assert server.proxy.billed == [
        3,
        *(sum(row[f"{kind}_tokens"] for row in rows) for kind in ("prompt", "completion")),
    ]
    tokenizer = server.endpoint().tokenizer
    for row in rows:
        # The student's tokenizer is the teacher's here, so both count alike.
        assert len(row["prompt_token_ids"]) == row["prompt_tokens"] <= longest(QUESTION, 16)
        assert tokenizer.decode(row["prompt_token_ids"]).endswith("2 + 3?</s><|assistant|>")
        ended = row["finish_reason"] == "stop"
        assert (row["token_ids"][-1:] == [tokenizer.eos_token_id]) == ended
        assert tokenizer.decode(row["token_ids"], skip_special_tokens=True) == row["text"]
        assert (row["logprob"], row["error"], row["lost"]) == (None, None, 0)


def test_seeds_are_passed_on(server: Served) -> None:
    first, again = server.ask(3), server.ask(3)
    assert [row["text"] for row in first] == [row["text"] for row in again]
    assert len({row["text"] for row in first}) == 3
    assert sorted(request["seed"] for request in server.proxy.requests[:3]) == [0, 1, 2]


def test_refused_requests_cost_nothing_and_are_sent_again(server: Served) -> None:
    server.proxy.reset(429, 503, 429)
    rows = server.ask(3)
    assert all(row["text"] is not None and row["lost"] == 0 for row in rows)
    assert len(server.proxy.requests) == 6


def test_a_retry_waits_as_long_as_the_endpoint_asks(server: Served) -> None:
    server.proxy.reset(429)
    server.proxy.retry_after = "2"
    server.ask(1)
    assert server.proxy.times[1] - server.proxy.times[0] >= 2


def test_lost_replies_are_sent_again_only_where_that_was_granted(server: Served) -> None:
    server.proxy.reset("hang up")
    (row,) = server.ask(1, spare=0)
    assert row["text"] is None
    assert "did not answer" in row["error"]
    assert (row["prompt_tokens"], row["completion_tokens"]) == (longest(QUESTION, 16), 8)
    assert len(server.proxy.requests) == 1

    server.proxy.reset("hang up", 500, None)
    (row,) = server.ask(1, spare=2)
    assert row["text"] is not None
    assert row["lost"] == 2
    # What really was billed is within what the row says.
    assert server.proxy.billed[0] == 2 <= 1 + row["lost"]


def test_an_answer_that_comes_too_late_is_lost(server: Served) -> None:
    server.proxy.reset("slow")
    (row,) = server.ask(1, service={"timeout_seconds": 1.0})
    assert "ReadTimeout" in row["error"]
    assert row["outage"]


def test_requests_keep_to_rate_and_concurrency(server: Served) -> None:
    server.ask(6, service={"requests_per_minute": 240, "concurrency": 2})
    gaps = [after - before for before, after in zip(server.proxy.times, server.proxy.times[1:], strict=False)]
    assert server.proxy.times[-1] - server.proxy.times[0] >= 5 * 0.25 - 0.1, gaps
    assert server.proxy.most_under_way <= 2


def test_a_prompt_that_the_endpoint_refuses_stays_without_an_answer(server: Served) -> None:
    endpoint = server.endpoint()
    long = [{"role": "user", "content": "x" * 600}]
    rows = endpoint.generate({}, [long, QUESTION], [[1], [2]], **LIMITS).to_pylist()
    assert (rows[0]["text"], rows[0]["prompt_tokens"], rows[0]["outage"]) == (None, 0, False)
    assert "400" in rows[0]["error"]
    assert rows[1]["text"] is not None


def test_mistakes_are_told_before_anything_is_asked(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def complaint(**change: Any) -> str:
        with pytest.raises(ValueError, match=r"\S") as caught:
            reach(OpenAIModel.model_validate({**server.settings(), **change}))
        return str(caught.value)

    reach(OpenAIModel.model_validate(server.settings()))
    assert complaint(model="other").startswith(f"model: {server.url} has no 'other'; it has {served.NAME}")
    assert "does not answer" in complaint(base_url="http://127.0.0.1:9/v1")
    assert complaint(key_variable="NO_SUCH_KEY").startswith("key_variable: NO_SUCH_KEY is not set")
    monkeypatch.setenv(KEY_VARIABLE, "wrong")
    refused = complaint()
    assert refused == f"key_variable: {server.url} refuses the key in {KEY_VARIABLE}"
    rows = server.ask(5)
    assert {row["error"] for row in rows} == {f"{server.url} refuses the key in {KEY_VARIABLE} (401)"}
    # After the first refusal the others that had not begun were not sent.
    assert len(server.proxy.requests) <= 4


def annotation(server: Served, root: Path, prompts: int, caps: dict[str, Any], **service: Any) -> Annotation:
    source = OpenAIModel.model_validate(server.settings(**service))
    plain = {**source.model_dump(mode="json", exclude={"type", "service"}), **source.service.model_dump(mode="json")}
    student = ModelRef(name="student", revision="1", id=str(server.folder / "teacher"))
    teacher = ModelRef(name=served.NAME, revision="openai:1")
    return Annotation(root, teacher, student, {"endpoint": plain}, prompts, caps)


@pytest.mark.usefixtures("cluster")
def test_the_sampling_stage_asks_an_endpoint_within_its_budget(server: Served, tmp_path: Path) -> None:
    """Replies are lost, requests refused, and the budget ends before the prompts: the endpoint's true bill stays within
    both accounts, and everything has its row."""
    server.proxy.reset(None, 500, None, 429, "hang up")
    most = longest([{"role": "user", "content": "What is 10 + 1?"}], 16) + 8
    made = annotation(server, tmp_path, 30, {"queries": 30, "tokens": 10 * most})
    stage = made.run()
    commit_manifest(stage.store, stage.manifest)
    facts, rows = stage.facts, read_rows(stage.store, stage.manifest, "queries").to_pylist()
    samples = read_rows(stage.store, stage.manifest, "samples").to_pylist()
    charged, spent = facts["charged"], facts["spent"]
    assert charged["prompt_tokens"] + charged["completion_tokens"] <= 10 * most
    requests, prompt_tokens, completion_tokens = server.proxy.billed
    assert requests <= spent["queries"] <= 45
    assert prompt_tokens <= spent["prompt_tokens"]
    assert completion_tokens <= spent["completion_tokens"]
    assert spent["prompt_tokens"] + spent["completion_tokens"] <= 15 * most
    reasons = [row["reason"] for row in rows]
    assert len(rows) == 30
    assert "budget_exhausted" in reasons
    answered = [row["prompt_id"] for row in rows if row["reason"] == "answered"]
    # More than ten were asked, for what was not used came back.
    assert len(rows) - reasons.count("budget_exhausted") > 10
    assert sorted(row["prompt_id"] for row in samples) == sorted(answered)
    settings = stage.settings.sampling
    for row in samples:
        assert row["sample_id"] == sample_id(row["prompt_id"], "teacher", "openai:1", settings, 0, row["seed"])
        assert (row["model"], row["logprob"]) == (served.NAME, None)
    assert served.KEY not in "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.usefixtures("cluster")
def test_an_outage_stops_the_stage_which_goes_on_where_it_was(server: Served, tmp_path: Path) -> None:
    made = annotation(server, tmp_path, 8, {"queries": 8}, tries=1, concurrency=1)
    server.proxy.reset(*[None] * 4, *[503] * 4)
    with pytest.raises(ValueError, match=r"^models\.teacher: .* answered 503; 4 requests had no answer"):
        made.run()
    server.proxy.faults.clear()
    stage = made.run()
    assert stage.facts["charged"]["queries"] == 8
    # The first shard was not asked again.
    assert server.proxy.billed[0] == 8
    assert stage.facts["spent"]["queries"] == 12


def test_a_plan_says_what_an_endpoint_cannot_do(server: Served, tmp_path: Path) -> None:
    data = tiny.settings(server.folder)
    data["models"]["teacher"] = server.settings()
    problems = plan_run(RunConfig.model_validate(data), str(tmp_path)).problems
    assert [problem.split(":")[0] for problem in problems] == [
        "train.method",
        "sampling.distributions",
        "evaluate.reference",
    ]
    assert problems[0].startswith("train.method: switch compares distributions")
    data["train"]["method"] = {"type": "seqkd"}
    data["evaluate"]["reference"] = "source"
    del data["sampling"]["distributions"]
    plan = plan_run(RunConfig.model_validate(data), str(tmp_path))
    assert plan.problems == []
    # How it is asked changes nothing.
    data["models"]["teacher"]["service"]["requests_per_minute"] = 5
    again = plan_run(RunConfig.model_validate(data), str(tmp_path))
    assert [stage.fingerprint for stage in again.stages] == [stage.fingerprint for stage in plan.stages]
    assert again.run == plan.run
    assert served.KEY not in json.dumps(plan.facts())

"""What a model, or an endpoint, may answer at worst: verifiers, scores, Parquet, tables in the terminal and pages take
it all, and a terminal or browser is given nothing that acts."""

import io
import json
import re
from html.parser import HTMLParser
from math import isfinite

import pyarrow as pa
import pytest
from garbage import EXAMPLES, TEXTS, fuzz, mutated, values
from hypothesis import example, given
from hypothesis import strategies as st
from rich.table import Table

from flows.console import PlainConsole
from flows.display import TerminalDisplay
from flows.tables import facts_table, trace_table
from infra.endpoint import answer_of, seconds, tokens
from infra.manifest import Manifest
from infra.parts import commit_part, read_part
from infra.store import LocalStore
from infra.terminal import visible
from kernels.consistency import consistency
from tasks.card import plain
from tasks.page import clip, environment
from tasks.rows import storable
from tasks.schemas import SAMPLE
from tasks.score import filled, question, rating
from tasks.verify import FORM_VERIFIERS, final_answer, harmless, is_correct, rouge_l

pytestmark = pytest.mark.timeout(7200 if EXAMPLES else 600)
PIECES = [
    *TEXTS,
    "</think>",
    "\\boxed{",
    "<answer>",
    "1,",
    "3/",
    "answer is (",
    "\x1b[31m",
    "\x1b]8;;http://x\x07",
    "#### ",
]
pieces = st.sampled_from(PIECES) | st.characters(exclude_categories=()) | st.text(max_size=10)
# Up to a megabyte of a few pieces.
outputs = st.lists(pieces, max_size=8).map("".join) | st.builds(
    lambda piece, count: (piece or "x") * min(count, 1_000_000 // len(piece or "x")),
    pieces,
    st.sampled_from([2, 50, 3000, 1_000_000]),
)
ESCAPES = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@fuzz(0.4)
@given(outputs, outputs)
@example("-" * 1_000_000, "7")
@example("\ud800" * 1000, "\udfff")
def test_verifiers_and_scores(text: str, reference: str) -> None:
    for name in FORM_VERIFIERS:
        final = final_answer(name, text, None)
        assert final is None or final.encode()
        assert is_correct(name, text, reference, None) in (True, False, None)
    agreed = consistency([final_answer("exact", text, None), final_answer("number", text, None), None], "p")
    assert 1 <= agreed.unique <= 3
    # Its table has a cell for each pair of words.
    assert isfinite(rouge_l(text, [reference[:300]]))
    assert 0 <= rating(text) <= 1
    harmless(text)
    asked = filled("Q: {question} A: {answer}", question([{"role": "user", "content": reference}]), text)
    assert text in asked


@fuzz(0.3)
@given(st.lists(outputs, min_size=1, max_size=4))
def test_parquet(tmp_path_factory: pytest.TempPathFactory, said: list[str]) -> None:
    store = LocalStore(tmp_path_factory.getbasetemp() / "output")
    rows = [{"sample_id": str(n), "text": storable(text)} for n, text in enumerate(said)]
    part = commit_part(store, "stages/s/f", "samples", 0, pa.Table.from_pylist(rows, SAMPLE))
    read = read_part(store, part)["text"].to_pylist()
    assert read == [storable(text) for text in said]
    store.delete(part.path)
    store.delete("stages/s/f/samples/00000.json")


def shown(*what: object) -> str:
    """What a terminal is given, without rich's own sequences."""
    sink = io.StringIO()
    console = PlainConsole(file=sink, width=100)
    for each in what:
        console.print(each)
    return sink.getvalue()


@fuzz(0.5)
@given(outputs.map(lambda text: text[:2000]))
@example("[/red]")
@example("[link=http://x]y[/link]")
@example("\x1b]0;owned\x07\x9b2J")
def test_terminal(text: str) -> None:
    assert not ESCAPES.search(visible(text))
    visible(text).encode()
    table = Table(title="t")
    table.add_row(text.replace("[", "("))
    facts = Manifest(
        stage="s", module="m", version=1, fingerprint="f", settings={}, inputs={}, facts={"a": text, "b": [text]}
    )
    given_to = shown(table, trace_table({"prompt": {"text": text}}), facts_table({"s": facts}))
    assert not ESCAPES.search(given_to)
    given_to.encode()
    # The live display as well.
    sink = io.StringIO()
    display = TerminalDisplay(PlainConsole(file=sink, width=100))
    display.notice(text)
    display.started("keep")
    display.progress("keep", {"done": 1, "total": 2, "unit": "rows", "now": text})
    display.console.print(display.live.get_renderable())
    assert not ESCAPES.search(sink.getvalue())


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.found.append(tag)


@fuzz(0.3)
@given(outputs)
def test_pages_and_cards(text: str) -> None:
    page = environment().from_string('<p title="{{ text }}">{{ text | clip }}</p>').render(text=text)
    assert Tags(page).found == ["p"]
    assert len(clip(text)) < 5000 or len(text) < 5000
    assert not Tags(plain(text)).found
    assert "\n" not in plain(text)


REPLY = {
    "choices": [{"message": {"role": "assistant", "content": "4"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 2},
}


@fuzz()
@given(mutated([REPLY]) | values)
@example({**REPLY, "choices": [{"message": {"content": "\ud800"}, "finish_reason": None}]})
@example({**REPLY, "choices": [{"message": None}]})
@example({**REPLY, "choices": [{"message": {"content": [{"type": "text", "text": "4"}]}}]})
@example({**REPLY, "usage": {"prompt_tokens": -5, "completion_tokens": None}})
def test_replies_of_an_endpoint(reply: object) -> None:
    reply = json.loads(json.dumps(reply, default=str))
    try:
        text, ended, usage = answer_of(reply)
    except (ValueError, LookupError, TypeError, AttributeError):
        return  # asked again, as a reply without a choice
    pa.array([text, ended], pa.string())
    # A bill below nothing would give budget back.
    assert 0 <= tokens(usage, "prompt_tokens", 9) < 1 << 31


@pytest.mark.parametrize("value", ["inf", "nan", "-1", "1e300", "Wed, 21 Oct 2026 07:28:00 GMT", "", None, "x"])
def test_no_pause_is_for_ever(value: str | None) -> None:
    assert 0 <= seconds(value) <= 3600

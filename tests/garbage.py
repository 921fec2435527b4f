"""What fuzz tests feed to readers: values, texts and bytes of every wrong kind, and right ones that were damaged.

``FUZZ_EXAMPLES`` is the number of cases a test tries: a few hundred, always the same, where it is not set.
"""

import copy
import datetime
import os
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
# What takes longer than this counts as a hang; busy machines are slow.
HANG_SECONDS = 20


def fuzz(share: float = 1.0) -> Callable[[Any], Any]:
    """Settings of a fuzz test that tries its ``share`` of the usual number of cases."""
    return settings(
        max_examples=int(EXAMPLES) if EXAMPLES else int(200 * share),
        derandomize=not EXAMPLES,
        deadline=datetime.timedelta(seconds=HANG_SECONDS),
        database=None,
        suppress_health_check=list(HealthCheck),
    )


TEXTS = [
    "",
    " ",
    "\0",
    "\x1b[2J\x1b]0;title\x07\x9b31m",
    "\ud800",
    "\U0001f642",
    "\u202egnp.exe",
    "line\nline\r\nline\u2028line",
    "../../../etc/passwd",
    "/etc/passwd",
    "s3://other-bucket/key",
    "file:///etc/passwd",
    "http://[",
    "$(touch x); `touch x`",
    "%s%n{0.__class__}{{ 7 * 7 }}",
    "[/red][link=x]",
    "</script><script>alert(1)</script>",
    "null",
    "~",
    "yes",
    "1e999",
    "-1",
    "٣",
    "x" * 5000,
]
NUMBERS = [0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 0.0, -0.0, 1e308, 5e-324, 0.5]
WRONG_NUMBERS = [float("nan"), float("inf"), float("-inf")]

texts = st.sampled_from(TEXTS) | st.text(max_size=20)
numbers = st.sampled_from(NUMBERS + WRONG_NUMBERS) | st.integers() | st.floats()
plain = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=8
)


def deep(depth: int) -> Any:
    """A list in a list in a list."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every value in mappings and lists, as (container, key)."""
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in inner:
        yield document, key
        yield from places(value)


@st.composite
def mutated(draw: st.DrawFn, documents: list[Any], wrong: st.SearchStrategy[Any] = values) -> Any:
    """One of the documents with some values dropped, renamed, wrapped, swapped or replaced by wrong ones."""
    document = copy.deepcopy(draw(st.sampled_from(documents)))
    for _ in range(draw(st.integers(1, 3))):
        known = list(places(document))
        if not known:
            break
        container, key = known[draw(st.integers(0, len(known) - 1))]
        match draw(st.sampled_from(["replace", "replace", "drop", "rename", "wrap", "swap", "repeat"])):
            case "replace":
                container[key] = draw(wrong)
            case "drop":
                del container[key]
            case "rename" if isinstance(container, dict):
                container[draw(texts)] = container.pop(key)
            case "wrap":
                container[key] = draw(st.sampled_from([[container[key]], {"x": container[key]}, deep(50)]))
            case "repeat" if isinstance(container, list):
                container.append(container[key])
            case _:
                other, place = known[draw(st.integers(0, len(known) - 1))]
                container[key] = copy.deepcopy(other[place]) if place in other or isinstance(other, list) else None
    return document


@st.composite
def damaged(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """One of the byte strings with bytes flipped, cut off, dropped, put in, or repeated."""
    data = draw(st.sampled_from(originals))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(1, 64)))
        match draw(st.sampled_from(["flip", "cut", "drop", "insert", "repeat", "behead"])):
            case "flip" if start < len(data):
                data = data[:start] + bytes([data[start] ^ (1 << draw(st.integers(0, 7)))]) + data[start + 1 :]
            case "cut":
                data = data[:start]
            case "behead":
                data = data[start:]
            case "drop":
                data = data[:start] + data[end:]
            case "repeat":
                data = data[:end] + data[start:end] * draw(st.integers(1, 50)) + data[end:]
            case _:
                data = data[:start] + draw(st.binary(min_size=1, max_size=16) | fragments) + data[start:]
    return data


fragments = st.sampled_from(
    [b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"[" * 3000, b"{" * 500, b'"', b"\n", b"\r", b"\x1b[31m", b"&a [*a]", b"NaN"]
)


def lines(problems: list[str]) -> None:
    """What a person is told: a line a problem, that says something."""
    for problem in problems:
        assert problem.strip()
        assert problem.splitlines() == [problem]
        assert "Traceback" not in problem

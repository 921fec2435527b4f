"""A source's row becomes a problem: which column means what, and which row is refused for what.

No files here: ``tasks/sources.py`` reads them and hands over row by row.
"""

import json
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from tasks.config.prompts import Fields
from tasks.forms import verifier_for

RAW_CHARACTERS = 10_000
ROLES = {"system", "developer", "user", "assistant", "tool"}
# So many column names are shown in an error.
SHOWN_COLUMNS = 30


class Row(NamedTuple):
    """A problem: the schema PROMPT without its id."""

    source: str
    position: int
    messages: list[dict[str, str]]
    answer: str | None
    reference: str | None
    verifier: str
    entry: str | None


class Refused(NamedTuple):
    """A row that is no problem: the schema QUARANTINE."""

    source: str
    position: int
    reason: str
    raw: str


def storable(text: str) -> str:
    """The text with lone surrogates as question marks."""
    return text.encode("utf-8", "replace").decode()


def refuse(source: str, position: int, reason: str, raw: str) -> Refused:
    """The row's beginning, storable whatever it holds."""
    return Refused(storable(source), position, reason, storable(raw[:RAW_CHARACTERS]))


class Unusable(Exception):
    """A row that is refused; the message is the reason."""


def as_text(value: Any) -> str | None:
    """Text as it is, numbers as Python writes them, everything else as JSON."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def content_text(content: Any) -> str:
    """A message's text, given as such or in OpenAI's parts of type text."""
    parts = content if isinstance(content, list) else [{"text": content or ""}]
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise Unusable("malformed")
    return "\n".join(part["text"] for part in parts)


def is_turn(value: Any) -> bool:
    """Whether it is a message of somebody known."""
    return isinstance(value, dict) and isinstance(value.get("role"), str) and value["role"] in ROLES


def as_messages(value: Any) -> list[dict[str, str]]:
    """Role and text of each message."""
    if not isinstance(value, list) or not all(map(is_turn, value)):
        raise Unusable("malformed")
    return [{"role": turn["role"], "content": content_text(turn.get("content"))} for turn in value]


class Mapper:
    """Turns one source's rows into problems, and remembers which of the named columns it met."""

    def __init__(self, place: str, name: str, fields: Fields, verifier: str) -> None:
        self.place, self.name, self.fields, self.verifier = place, name, fields, verifier
        self.pattern = re.compile(fields.answer_pattern) if fields.answer_pattern else None
        skipped = {"answer_pattern", "prompt"} if fields.messages else {"answer_pattern"}
        self.unseen: dict[str, str] = fields.model_dump(exclude=skipped, exclude_none=True)
        self.columns: dict[str, None] = {}
        self.met = False
        self.answers = self.matched = 0

    def __call__(self, position: int, row: dict[str, Any], raw: str | None = None) -> Row | Refused:
        """The problem, or the refused row; ``raw`` is the row as it stood in its file."""
        self.meet(row)
        source = (as_text(row.get(self.fields.source)) if self.fields.source else None) or self.name
        try:
            found = self.problem(source, position, row)
            texts = (source, found.answer, found.reference, *(turn["content"] for turn in found.messages))
            "".join(text or "" for text in texts).encode()
            return found
        except Unusable as error:
            reason = str(error)
        except UnicodeEncodeError:
            reason = "undecodable"
        except RecursionError:
            reason = "malformed"
        return refuse(source, position, reason, raw or json.dumps(row, ensure_ascii=False, default=str))

    def meet(self, columns: Collection[str]) -> None:
        """Note the columns of a row, or of a whole file."""
        self.met = True
        if len(self.columns) < SHOWN_COLUMNS:
            self.columns.update(dict.fromkeys(columns))
        if self.unseen:
            self.unseen = {field: column for field, column in self.unseen.items() if column not in columns}

    def problem(self, source: str, position: int, row: dict[str, Any]) -> Row:
        fields = self.fields
        messages, reference = self.conversation(row)
        if not any(turn["content"].strip() for turn in messages if turn["role"] != "system"):
            raise Unusable("empty_prompt")
        if messages[-1]["role"] not in ("user", "tool"):
            raise Unusable("malformed")
        answer = self.answer(as_text(row.get(fields.answer)) if fields.answer else None)
        own = as_text(row.get(fields.reference)) if fields.reference else None
        verifier = verifier_for(answer) if self.verifier == "auto" else self.verifier
        # A user's own verifier may need anything of the row, such as test cases.
        entry = json.dumps(row, default=str) if ":" in verifier else None
        return Row(source, position, messages, answer, own or reference or None, verifier, entry)

    def conversation(self, row: dict[str, Any]) -> tuple[list[dict[str, str]], str | None]:
        """The messages up to the model's turn, and that turn where it is given."""
        column = self.fields.messages or self.fields.prompt
        assert column, "the settings name one of the two"
        if column not in row:
            raise Unusable("missing_field")
        if self.fields.messages:
            messages = as_messages(row[column])
            if messages and messages[-1]["role"] == "assistant":
                return messages[:-1], messages[-1]["content"]
            return messages, None
        prompt = row[column]
        if not isinstance(prompt, (str, int, float, type(None))):
            raise Unusable("malformed")
        context = as_text(row.get(self.fields.context)) if self.fields.context else None
        parts = [text for text in (as_text(prompt), context) if text and text.strip()]
        # A context without its question is no prompt.
        return [{"role": "user", "content": "\n\n".join(parts) if prompt not in (None, "") else ""}], None

    def answer(self, value: str | None) -> str | None:
        """The known final answer within the answer column."""
        if value is None or self.pattern is None:
            return value
        self.answers += 1
        found = self.pattern.search(value)
        self.matched += bool(found)
        return found[1].strip() if found and found[1] else None

    def finish(self, scope: str = "") -> None:
        """ValueError where a named column, or the answer's pattern, was met nowhere. ``scope``: what was read."""
        if self.met and self.unseen:
            field, column = next(iter(self.unseen.items()))
            raise ValueError(
                f"{self.place}: no row{scope} has the column {column!r} of fields.{field}; set fields.{field} to one of"
                f" {', '.join(map(repr, self.columns))}"
            )
        if self.answers and not self.matched:
            raise ValueError(
                f"{self.place}: fields.answer_pattern {self.fields.answer_pattern!r} matches no row{scope}: correct it"
            )

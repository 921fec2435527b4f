"""A source's row becomes a problem: which column means what, and what is refused.

Plain functions and one small state per source (the columns seen), no files.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from tasks.config.prompts import Fields
from tasks.forms import verifier_for

RAW_CHARACTERS = 10_000
ROLES = {"system", "developer", "user", "assistant", "tool"}
# So many column names are shown in an error.
SHOWN_COLUMNS = 30


@dataclass(frozen=True, slots=True)
class Row:
    """A problem, as in the schema PROMPT."""

    source: str
    position: int
    messages: list[dict[str, str]]
    answer: str | None
    reference: str | None
    verifier: str
    entry: str | None


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that is no problem: reason and what it looked like, as in the schema QUARANTINE."""

    source: str
    position: int
    reason: str
    raw: str


def refuse(source: str, position: int, reason: str, raw: str) -> Refused:
    """The row's beginning, storable whatever it holds."""
    storable = raw[:RAW_CHARACTERS].encode("utf-8", "replace").decode()
    return Refused(source.encode("utf-8", "replace").decode(), position, reason, storable)


class Malformed(Exception):
    """A value of a type that means nothing here."""


def as_text(value: Any) -> str | None:
    """Scalars as text; structures as JSON."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (dict, list, bool)) else str(value)


def content_text(content: Any) -> str:
    """A message's text, given as such or in OpenAI's parts."""
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise Malformed
        return "\n".join(part["text"] for part in content)
    if content is None:
        return ""
    if not isinstance(content, str):
        raise Malformed
    return content


def as_messages(value: Any) -> list[dict[str, str]]:
    """Role and text of each message. Malformed for anything else."""
    if not isinstance(value, list):
        raise Malformed
    messages = []
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise Malformed
        messages.append({"role": message["role"], "content": content_text(message.get("content"))})
    return messages


class Mapper:
    """Turns one source's rows into problems, and remembers which of the named columns it met."""

    def __init__(self, place: str, name: str, fields: Fields, verifier: str) -> None:
        self.place, self.name, self.fields, self.verifier = place, name, fields, verifier
        self.pattern = re.compile(fields.answer_pattern) if fields.answer_pattern else None
        named = fields.model_dump(exclude={"prompt"} if fields.messages else set(), exclude_none=True)
        self.unseen = {field: column for field, column in named.items() if field != "answer_pattern"}
        self.columns: dict[str, None] = {}
        self.rows = self.answers = self.matched = 0

    def __call__(self, position: int, row: dict[str, Any], raw: str | None = None) -> Row | Refused:
        """The problem, or the refused row; ``raw`` is the row as it stood in the file."""
        self.rows += 1
        if len(self.columns) < SHOWN_COLUMNS:
            self.columns.update(dict.fromkeys(row))
        if self.unseen:
            self.unseen = {field: column for field, column in self.unseen.items() if column not in row}
        source = as_text(row.get(self.fields.source)) if self.fields.source else None
        source = source or self.name
        try:
            found = self.read(source, position, row)
            strings = [source, found.answer or "", found.reference or "", *(turn["content"] for turn in found.messages)]
            "".join(strings).encode()
            return found
        except Malformed:
            reason = "malformed"
        except KeyError:
            reason = "missing_field"
        except UnicodeEncodeError:
            reason = "undecodable"
        except EOFError:
            reason = "empty_prompt"
        return refuse(source, position, reason, raw or json.dumps(row, ensure_ascii=False, default=str))

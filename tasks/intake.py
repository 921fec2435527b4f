"""Intake: sources are read, measured with the chat template, and entered into the stage's duckdb database.

Tables ``rows`` (usable so far), ``refused`` (not so, with the reason) and ``fate`` (rows that a later step refuses).
Used by ``python -m tasks.prompts``.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import duckdb
import pyarrow as pa

from tasks import schemas
from tasks.config.prompts import PromptsConfig, PromptSource
from tasks.dedupe import content_hash, insert
from tasks.rows import Refused, Row, refuse
from tasks.sources import check, read, refuse_useless

# A batch in memory: at most so many rows, about so many characters.
BATCH_ROWS, BATCH_CHARACTERS = 1024, 32 << 20

TABLES = """
    CREATE TABLE rows (
        n BIGINT, heldout BOOLEAN, tokens INTEGER, position BIGINT, prompt_id VARCHAR, source VARCHAR,
        messages STRUCT(role VARCHAR, content VARCHAR)[], answer VARCHAR, reference VARCHAR, verifier VARCHAR,
        entry VARCHAR
    );
    CREATE TABLE refused (n BIGINT, source VARCHAR, position BIGINT, reason VARCHAR, raw VARCHAR);
    CREATE TABLE fate (n BIGINT, reason VARCHAR);
"""
# n orders all that was read, held-out sources first.
ROWS = pa.schema(
    [("n", pa.int64()), ("heldout", pa.bool_()), ("tokens", pa.int32()), ("position", pa.int64()), *schemas.PROMPT]
)
REFUSED = pa.schema([("n", pa.int64()), *schemas.QUARANTINE])


class Measure:
    """Counts a conversation's tokens, the opening of the model's turn included."""

    def __init__(self, tokenizer: Any, limit: int, template_args: dict[str, Any]) -> None:
        self.tokenizer, self.limit, self.template_args = tokenizer, limit, template_args
        # No token stands for more characters, so a longer text need not be tokenised to be refused.
        self.most_characters = limit * max(map(len, tokenizer.get_vocab()))

    def render(self, messages: list[dict[str, str]]) -> str | None:
        """The text the model reads; None where the template refuses the conversation."""
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self.template_args
            )
        except TemplateError:
            return None

    def __call__(self, conversations: list[list[dict[str, str]]]) -> list[int | str]:
        """Tokens of each conversation, or the reason for which it is refused."""
        texts = [self.render(messages) for messages in conversations]
        short = [text for text in texts if text is not None and len(text) <= self.most_characters]
        encoded = self.tokenizer(short, add_special_tokens=False, verbose=False)["input_ids"] if short else []
        lengths = iter([len(ids) for ids in encoded])
        found: list[int | str] = []
        for text in texts:
            if text is None:
                found.append("no_template")
            else:
                tokens = next(lengths) if len(text) <= self.most_characters else self.limit + 1
                found.append(tokens if tokens <= self.limit else "too_long")
        return found


@contextmanager
def standing_at(place: str) -> Iterator[None]:
    """Say of a source's complaint where in the settings the source stands."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


class Intake:
    """Reads sources into the database, batch by batch. ``report(done, expected)`` is told of the rows read."""

    def __init__(
        self,
        db: duckdb.DuckDBPyConnection,
        config: PromptsConfig,
        measure: Measure,
        report: Callable[[int, int], None],
    ) -> None:
        self.db, self.config, self.measure, self.report = db, config, measure, report
        self.done = 0
        db.execute(TABLES)

    def read_all(self) -> None:
        """ValueError where a source cannot be read, is empty, or holds no usable row."""
        sources = [(f"prompts.heldout_sources.{n}", source) for n, source in enumerate(self.config.heldout_sources)]
        sources += [(f"prompts.sources.{n}", source) for n, source in enumerate(self.config.sources)]
        expected = 0
        for place, source in sources:
            with standing_at(place):
                expected += check(source) or 0
        for place, source in sources:
            with standing_at(place):
                self.read_source(source, place.startswith("prompts.heldout"), expected)

    def read_source(self, source: PromptSource, heldout: bool, expected: int) -> None:
        reasons: Counter[str] = Counter()
        for batch in self.batches(source):
            reasons.update(self.store(batch, heldout))
            self.report(self.done, max(expected, self.done + 1))
        refuse_useless(source, reasons)

    def batches(self, source: PromptSource) -> Iterator[list[Row | Refused]]:
        batch: list[Row | Refused] = []
        characters = 0
        for row in read(source, self.config.verifier):
            batch.append(row)
            characters += len(row.raw if isinstance(row, Refused) else f"{row.messages}{row.reference}{row.entry}")
            if len(batch) == BATCH_ROWS or characters > BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch

    def store(self, batch: list[Row | Refused], heldout: bool) -> list[str]:
        """Enter a batch; the reason of each refused row, "" for the others."""
        measures = iter(self.measure([self.conversation(row) for row in batch if isinstance(row, Row)]))
        good: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        for n, row in enumerate(batch, self.done):
            measure = row.reason if isinstance(row, Refused) else next(measures)
            if isinstance(row, Row) and isinstance(measure, int):
                messages = self.conversation(row)
                own = {"n": n, "heldout": heldout, "tokens": measure, "prompt_id": content_hash(messages)}
                good.append({**row._asdict(), **own, "messages": messages})
            elif isinstance(row, Row):
                said = "\n".join(turn["content"] for turn in row.messages)
                bad.append({"n": n, **refuse(row.source, row.position, str(measure), said)._asdict()})
            else:
                bad.append({"n": n, **row._asdict()})
        self.done += len(batch)
        insert(self.db, "rows", pa.Table.from_pylist(good, schema=ROWS))
        insert(self.db, "refused", pa.Table.from_pylist(bad, schema=REFUSED))
        return [""] * len(good) + [row["reason"] for row in bad]

    def conversation(self, row: Row) -> list[dict[str, str]]:
        """The row's messages, below the settings' system prompt where they have none."""
        if self.config.system is None or row.messages[0]["role"] in ("system", "developer"):
            return row.messages
        return [{"role": "system", "content": self.config.system}, *row.messages]

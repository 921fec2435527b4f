"""Where prompts come from, and which of them are refused."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tasks.config.base import Config


class ReasoningGymTask(Config):
    """One procedurally generated, verified task."""

    name: str = Field(min_length=1)
    """Name in reasoning-gym, such as ``chain_sum``."""
    size: int = Field(ge=1, le=100_000_000)
    """Problems to generate."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further options of the task, such as ``min_terms: 2``."""


class ReasoningGymSource(Config):
    """Unlimited verified problems, made on the spot."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    tasks: list[ReasoningGymTask] = Field(min_length=1)
    """Tasks and their sizes."""
    seed: int = 0
    """Seed of the generator."""


class Fields(Config):
    """Which columns of a row mean what. A row has a plain prompt or OpenAI-style messages."""

    prompt: str | None = "prompt"
    """Column of a plain prompt."""
    messages: str | None = None
    """Column of messages (a list of ``{role, content}``); takes precedence over the prompt. A last message of the
    assistant is the reference response."""
    context: str | None = None
    """Column whose text, where not empty, is put below the prompt (such as Dolly's context)."""
    answer: str | None = None
    """Column of the known final answer."""
    answer_pattern: str | None = None
    """Regular expression with one group that finds the final answer in the answer column (GSM8K: ``#### (.+)``)."""
    reference: str | None = None
    """Column of a full reference response."""
    source: str | None = None
    """Column of the task name; the source's own where absent."""

    @model_validator(mode="after")
    def _usable(self) -> "Fields":
        if not self.prompt and not self.messages:
            raise ValueError("fields name neither a prompt nor a messages column: give one")
        if self.answer_pattern is not None:
            if not self.answer:
                raise ValueError("fields.answer_pattern needs fields.answer, the column it looks in")
            try:
                groups = re.compile(self.answer_pattern).groups
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"fields.answer_pattern {self.answer_pattern!r} is no pattern: {error}") from None
            if groups != 1:
                raise ValueError(f"fields.answer_pattern {self.answer_pattern!r} has {groups} groups: it needs one ( )")
        return self


class JsonlSource(Config):
    """A file of JSON lines, plain or gzipped; local path or s3://."""

    type: Literal["jsonl"] = "jsonl"
    path: str = Field(min_length=1)
    """The file."""
    fields: Fields = Fields()
    """Its columns."""
    task: str | None = None
    """Task name of its rows; the file's name where absent."""
    limit: int | None = Field(default=None, ge=1)
    """Read only this many rows."""


class ParquetSource(Config):
    """A Parquet file or a folder of them; local path or s3://."""

    type: Literal["parquet"] = "parquet"
    path: str = Field(min_length=1)
    """The file or folder."""
    fields: Fields = Fields()
    """Its columns."""
    task: str | None = None
    """Task name of its rows; the file's name where absent."""
    limit: int | None = Field(default=None, ge=1)
    """Read only this many rows."""


class HuggingFaceSource(Config):
    """A data set of the Hugging Face hub, streamed."""

    type: Literal["huggingface"] = "huggingface"
    id: str = Field(min_length=1)
    """Data set id."""
    name: str | None = None
    """Configuration of the data set."""
    split: str = "train"
    """Split."""
    revision: str | None = None
    """Commit, tag or branch."""
    fields: Fields = Fields()
    """Its columns."""
    limit: int | None = Field(default=None, ge=1)
    """Read only this many rows."""


class InboxSource(Config):
    """A folder where files of prompts arrive; each run takes the prompts that no run before it took.

    Files end with .jsonl, .ndjson, either of them with .gz, or .parquet; those whose names begin with a dot or an
    underscore are left alone. A file that may still be being written waits for the next run: a local one that was
    changed a moment ago, and any whose last line, gzip trailer or Parquet footer is not there yet. Objects on S3 appear
    whole. A file may grow: what stood in it before is not taken again.
    """

    type: Literal["inbox"] = "inbox"
    path: str = Field(min_length=1)
    """The folder, or s3://bucket/prefix; files in folders below it count too."""
    fields: Fields = Fields()
    """Columns of its files."""
    task: str | None = None
    """Task name of its rows; the folder's name where absent."""
    quiet_seconds: float = Field(default=60, ge=0)
    """A local file waits until it has not been changed for so long."""
    max_files: int | None = Field(default=None, ge=1)
    """Files that one run takes at most, in the order of their names; the others wait."""


PromptSource = Annotated[
    ReasoningGymSource | JsonlSource | ParquetSource | HuggingFaceSource | InboxSource,
    Field(discriminator="type"),
]


class NearDuplicates(Config):
    """Near-duplicate removal by MinHash over word 3-grams."""

    enabled: bool = True
    """Remove near duplicates. Turn it off for templated problems that differ by a number only."""
    threshold: float = Field(default=0.9, gt=0, le=1)
    """Jaccard similarity from which two prompts count as one."""


class PromptsConfig(Config):
    """The prompts of a run."""

    sources: list[PromptSource] = Field(min_length=1)
    """Sources of prompts to learn from."""
    heldout_sources: list[PromptSource] = Field(default_factory=list)
    """Sources of held-out prompts; where empty, they are set aside from the sources."""
    heldout: int = Field(default=200, ge=2)
    """Held-out prompts for the evaluation."""
    system: str | None = None
    """System prompt put before conversations that have none."""
    verifier: str = "auto"
    """How answers are checked: ``auto`` (a task's own; for files by the answer's form: a number, a letter, yes or no,
    LaTeX, else the exact text), ``number``, ``choice``, ``yes_no``, ``exact``,
    ``math``, ``none``, or your own as ``module:function`` (text, answer, entry) -> (final_answer, correct)."""
    max_prompt_tokens: int = Field(default=256, ge=8)
    """Longer prompts are quarantined."""
    near_duplicates: NearDuplicates = NearDuplicates()
    """Near-duplicate removal."""

    @model_validator(mode="after")
    def _verifier_is_known(self) -> "PromptsConfig":
        known = {"auto", "number", "choice", "yes_no", "exact", "math", "none"}
        if self.verifier not in known and ":" not in self.verifier:
            raise ValueError(
                f"verifier {self.verifier!r} is not known: use {', '.join(sorted(known))} or module:function"
            )
        return self

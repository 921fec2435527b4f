"""Data sets of the Hugging Face hub, streamed. A folder on this machine in place of the id works as well."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from infra.files import content_id, find_files
from tasks.config.prompts import HuggingFaceSource
from tasks.rows import Mapper, Refused, Row


class Unreadable(ValueError):
    """What keeps a data set from being read, already told."""


@contextmanager
def reachable(source: HuggingFaceSource) -> Iterator[None]:
    """One line for everything that keeps a data set from being read."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except Unreadable:
        raise
    except (OSError, ValueError, DatasetsError, HTTPError) as error:
        cause = " ".join(str(error).split())[:300]
        raise Unreadable(
            f"data set {source.id!r}, name {source.name!r}, split {source.split!r} cannot be read"
            f" ({cause}): correct them, or use a jsonl or parquet file where the hub cannot be reached"
        ) from None


def dataset_commit(source: HuggingFaceSource) -> str:
    """The commit that the revision names now; for a folder, its files' contents. ValueError where unreachable."""
    if Path(source.id).is_dir():
        return " ".join(content_id(file) for file in find_files(source.id, ""))
    from huggingface_hub import HfApi

    with reachable(source):
        return HfApi().dataset_info(source.id, revision=source.revision).sha or "unknown"


def open_dataset(source: HuggingFaceSource) -> Any:
    from datasets import load_dataset

    # Asking for the commit first says at once, not after minutes of retries, that the hub cannot be reached.
    revision = None if Path(source.id).is_dir() else dataset_commit(source)
    return load_dataset(source.id, source.name, split=source.split, revision=revision, streaming=True)


def read_dataset(source: HuggingFaceSource, verifier: str, limit: int | None, scope: str) -> Iterator[Row | Refused]:
    """Rows of the data set, of the named columns only unless a user's own verifier may want them all. ValueError where
    it cannot be read or has no such column."""
    mapper = Mapper(f"{source.id!r}", source.id.rstrip("/").rpartition("/")[2], source.fields, verifier)
    with reachable(source):
        dataset = open_dataset(source)
    if names := dataset.column_names:
        wanted = set(mapper.unseen.values())
        mapper.meet(names)
        mapper.finish()
        if ":" not in verifier:
            dataset = dataset.select_columns([name for name in names if name in wanted])
    with reachable(source):
        for position, row in enumerate(islice(dataset, limit)):
            yield mapper(position, row)
    mapper.finish(scope)

"""Replay: rows that earlier runs kept, as a share of what stage 2 trains on.

    python -m tasks.replay --spec SPEC.json

Tables ``kept`` and ``charged``, as of ``tasks.keep``: their prompts were charged when they were annotated. The draw
takes the smallest hashes of row ids, salted anew in every run; one part is in memory at a time.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from infra.manifest import load_manifest
from infra.models import ModelRef
from infra.parts import read_part
from tasks import schemas
from tasks.config.base import Config
from tasks.stage import Stage, main


class ReplaySettings(Config):
    """How many rows, and of which."""

    share: float = Field(ge=0, lt=1)
    """Share of all training rows."""
    draw: int
    """Number of the run: each draws anew."""
    seed: int = 0
    """Seed of the run."""
    rows: list[str] = Field(min_length=1)
    """Inputs with this run's own rows, which the share is measured by."""
    earlier: list[str] = Field(min_length=1)
    """Inputs with rows of earlier runs."""
    stored: bool = False
    """Only rows with the teacher's distributions."""


# A row by the draw: its hash, the input it stands in, the part of its table, and its place there.
Place = tuple[bytes, str, int, int]


def tokenizer(stage: Stage[ReplaySettings], name: str) -> str:
    """Of the teacher that wrote an input's rows."""
    models = load_manifest(stage.store, stage.input(name).inputs["models"]) if name != "models" else stage.input(name)
    return ModelRef.model_validate(models.facts["models"]["teacher"]).tokenizer_hash


def places(stage: Stage[ReplaySettings], left_out: Counter[str]) -> Iterator[Place]:
    """All rows that may be drawn. Token ids of another tokenizer would mean something else."""
    settings, own = stage.settings, tokenizer(stage, "models")
    for name in settings.earlier:
        kept = stage.input(name).tables["kept"]
        if tokenizer(stage, name) != own:
            left_out["other_tokenizer"] += kept.rows
            continue
        for number, part in enumerate(kept.parts):
            rows = read_part(stage.store, part, ["row_id", *(["distributions"] if settings.stored else [])])
            usable = pc.is_valid(rows["distributions"]).to_pylist() if settings.stored else [True] * len(rows)
            left_out["no_distributions"] += usable.count(False)
            for at, row_id in enumerate(rows["row_id"].to_pylist()):
                if usable[at]:
                    salted = f"{settings.seed}\x1freplay\x1f{settings.draw}\x1f{row_id}".encode()
                    yield hashlib.sha256(salted).digest(), name, number, at


def run(stage: Stage[ReplaySettings]) -> None:
    settings, left_out = stage.settings, Counter[str]()
    new = sum(stage.input(name).tables["kept"].rows for name in settings.rows)
    wanted = round(new * settings.share / (1 - settings.share))
    by_part: dict[tuple[str, int], list[int]] = {}
    for _, name, number, at in heapq.nsmallest(wanted, places(stage, left_out)):
        by_part.setdefault((name, number), []).append(at)
    for shard, ((name, number), chosen) in enumerate(sorted(by_part.items())):
        part = stage.input(name).tables["kept"].parts[number]
        rows = read_part(stage.store, part).take(pa.array(sorted(chosen)))
        stage.commit("kept", shard, rows)
        stage.commit("charged", shard, rows.select(schemas.CHARGED.names))
        stage.progress(shard + 1, len(by_part), "parts")
    stage.close_table("kept", schemas.KEPT)
    stage.close_table("charged", schemas.CHARGED)
    stage.facts.update(
        wanted=wanted, drawn=stage.manifest.tables["kept"].rows, runs=len(settings.earlier), left_out=dict(left_out)
    )


if __name__ == "__main__":
    main(ReplaySettings, run)

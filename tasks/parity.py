"""Parity: do the models that train give the log-probabilities that the engines gave? (method.md, section 5)

    python -m tasks.parity --spec SPEC.json

Before stage 2 trains, teacher and student read a few sequences that they wrote through the engines, and every token's
log-probability is compared. Where both disagree, samples and losses would speak of different models. Alone, as
``switchyard plan --deep`` runs it, the same is done with the models as they are.

Shape legend: T response tokens.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from pydantic import BaseModel

from infra.manifest import Manifest, load_manifest
from infra.models import ModelRef, load_model, local_folder
from infra.parts import read_table
from infra.store import Store, open_store
from kernels.rules import evaluating
from tasks.config.base import Config
from tasks.config.train import Parity
from tasks.plan import Plan
from tasks.stage import Stage, main
from tasks.student import Student

COLUMNS = ["prompt_token_ids", "token_ids", "token_logprobs"]


class Gap(BaseModel):
    """How far an engine and a training model are apart: log-probabilities of the tokens written, nats."""

    sequences: int
    tokens: int
    mean: float
    largest: float


@torch.no_grad()
def gap(model: Any, rows: Iterable[dict[str, Any]]) -> Gap | None:
    """The gap over these samples (columns ``COLUMNS``); None of none."""
    differences = []
    with evaluating(model):
        for row in rows:
            ids, start = row["prompt_token_ids"] + row["token_ids"], len(row["prompt_token_ids"])
            logits_TV = model(torch.tensor([ids], device=model.device)).logits[0, start - 1 : -1]
            logprobs_T = (
                logits_TV.float().log_softmax(-1).cpu().gather(-1, torch.tensor(row["token_ids"])[:, None])[:, 0]
            )
            differences.append((logprobs_T - torch.tensor(row["token_logprobs"])).abs())
    if not differences:
        return None
    all_T = torch.cat(differences)
    return Gap(sequences=len(differences), tokens=len(all_T), mean=all_T.mean().item(), largest=all_T.max().item())


def first_rows(store: Store, samples: Manifest, count: int) -> list[dict[str, Any]]:
    """The first samples that have their tokens' log-probabilities."""
    rows: list[dict[str, Any]] = []
    for part in read_table(store, samples, "samples", COLUMNS):
        rows += [row for row in part.to_pylist() if row["token_ids"] and row["token_logprobs"]]
        if len(rows) >= count:
            break
    return rows[:count]


def judge(role: str, found: Gap, settings: Parity, dtype: str) -> None:
    """ValueError with the figures where the gap is past the tolerance of ``dtype``."""
    allowed = settings.bfloat16 if dtype == "bfloat16" else settings.float32
    if not (found.mean <= allowed.mean and found.largest <= allowed.largest):
        raise ValueError(
            f"train.parity: the {role}'s engine and its training model differ by {found.mean:.4g} nats a token on "
            f"average and {found.largest:.4g} at most, over {found.tokens} tokens in {dtype} (allowed: "
            f"{allowed.mean:g} and {allowed.largest:g}); serve and train in one dtype, or raise train.parity.{dtype}"
        )


def check(plan: Plan, teacher: Any | None, student: Student) -> dict[str, dict[str, Any]]:
    """The gap by role on the samples that the plan names. Collective; ValueError past the tolerance."""
    settings, store, found = plan.train.parity, open_store(plan.root), {}
    for role, path in plan.samples.items():
        rows = first_rows(store, load_manifest(store, path), settings.sequences)
        with student.whole() if role == "student" else nullcontext(teacher) as model:
            seen = gap(model, rows) if model is not None else None
        if seen:
            judge(role, seen, settings, plan.dtype)
            found[role] = seen.model_dump()
    return found


class ParitySettings(Config):
    """What ``switchyard plan --deep`` checks."""

    parity: Parity
    """How many sequences, and what is allowed."""
    gpu: bool = False
    """Whether training will compute in bfloat16."""


def run(stage: Stage[ParitySettings]) -> None:
    settings, dtype = stage.settings.parity, "bfloat16" if stage.settings.gpu else "float32"
    models = stage.input("models").facts["models"]
    for role in ("teacher", "student"):
        samples = load_manifest(stage.store, stage.spec.inputs[f"{role}-samples"])
        model = load_model(local_folder(stage.store, ModelRef.model_validate(models[role])), dtype)
        found = gap(model, first_rows(stage.store, samples, settings.sequences))
        if found:
            stage.facts[role] = found.model_dump()
            judge(role, found, settings, dtype)


if __name__ == "__main__":
    main(ParitySettings, run)

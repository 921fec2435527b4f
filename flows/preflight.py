"""Everything that can be known to go wrong before anything expensive starts. One line a problem: field, value, fix.

Checks have names, so that a plan can say what was looked at, not only what was found.
"""

import os
import shutil
import uuid
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from pydantic import ValidationError

from flows.estimate import GIB, Estimate, candidates
from flows.model_checks import cache, distributions, family, templates, text_only, whole
from flows.reach import reach
from flows.story import on_gpu
from flows.trackers import usable
from infra.files import list_files
from infra.store import open_store
from tasks.config import RunConfig
from tasks.config.evaluation import Evaluation
from tasks.config.models import OpenAIModel
from tasks.config.peers import BySource
from tasks.config.prompts import InboxSource, ReasoningGymSource
from tasks.ledger import Amount, caps_of
from tasks.models import identity
from tasks.sources import check as check_source
from tasks.verify import check_verifier

# A file's rows are estimated by the length of its first ones.
ESTIMATE_MARGIN = 1.5
# Problems by name of the check; none where it passed.
Checks = dict[str, list[str]]


def problem(where: str, check: Callable[[], Any]) -> list[str]:
    """The check's complaint as one line, prefixed with where it was found."""
    try:
        check()
    except (ValueError, OSError, ValidationError) as error:
        return [f"{where}: {' '.join(str(error).split())}"]
    return []


def readable(config: RunConfig, root: str) -> Checks:
    """Store, models and sources are there."""
    models = config.served.values()
    found = [line for model in models for line in problem(model.field, partial(identity, model.source))] or [
        line for model in models for line in problem(model.field, partial(whole, model.source))
    ]
    for model in models:
        if isinstance(model.source, OpenAIModel):
            found += problem(model.field, partial(reach, model.source))
    own = config.prompts.verifier
    verifier = problem("prompts.verifier", partial(check_verifier, own)) if own != "auto" else []
    return {
        "store can be written": problem("--root", partial(writable, root)),
        "models can be read": list(dict.fromkeys(found)),
        "prompts can be read": sources_readable(config),
        "verifier is there": verifier,
        "trackers can be used": usable(config.trackers),
    }


def sources_readable(config: RunConfig) -> list[str]:
    found = []
    for kind in ("sources", "heldout_sources"):
        for number, source in enumerate(getattr(config.prompts, kind)):
            check = partial(list_inbox if isinstance(source, InboxSource) else check_source, source)
            found += problem(f"prompts.{kind}.{number}", check)
    return found


def list_inbox(source: InboxSource) -> None:
    """ValueError where it cannot be listed. An empty one is as it should be."""
    deque(list_files(source.path), maxlen=0)


def measurable(evaluation: Evaluation, root: str) -> list[str]:
    """The same for an evaluation alone."""
    found = problem("--root", partial(writable, root))
    found += problem("model", partial(identity, evaluation.model))
    for number, source in enumerate(evaluation.problems):
        found += problem(f"problems.{number}", partial(check_source, source))
    if evaluation.verifier != "auto":
        found += problem("verifier", partial(check_verifier, evaluation.verifier))
    found += usable(evaluation.trackers)
    return found or places(evaluation.settings(), root)


def writable(root: str) -> None:
    """ValueError or OSError where the store cannot be written."""
    from botocore.exceptions import BotoCoreError, ClientError

    store, path = open_store(root), f"probe/{uuid.uuid4().hex}"
    try:
        store.create(path, b"")
        store.delete(path)
    except (BotoCoreError, ClientError) as error:
        raise ValueError(f"{root} cannot be written: {error}") from None
    except OSError as error:
        raise ValueError(f"{root} cannot be written: {error.strerror}; choose another folder") from None


def preflight(config: RunConfig, root: str, needs: Estimate) -> Checks:
    """Combinations, capacities and the models' own limits."""
    return {
        "store can be seen by the cluster": places(config, root),
        "prompts cover the budget": enough(config),
        "budget covers a prompt": affordable(config),
        **({"mentor has prompts": unasked(config)} if config.mentor else {}),
        "disk, memory and cores": capacity(config, root, needs),
        "lengths": lengths(config),
        "chat templates": templates(config),
        "key-value caches": cache(config),
        "tokenizers and widths": [
            *(text_only(config) if config.text_only else distributions(config)),
            *family(config),
        ],
    }


def enough(config: RunConfig) -> list[str]:
    """Prompts are as many as queries, as far as that is known before they are read: a long file is estimated, and only
    the prompts stage knows what is usable of it."""
    if config.recurring:
        return []
    learn = [
        sum(task.size for task in source.tasks) if isinstance(source, ReasoningGymSource) else check_source(source)
        for source in config.prompts.sources
    ]
    if None in learn:
        return []
    generated = all(isinstance(source, ReasoningGymSource) for source in config.prompts.sources)
    aside = 0 if config.prompts.heldout_sources else config.prompts.heldout
    left = sum(count or 0 for count in learn) - aside
    needed = config.warmup_prompts + config.selected_prompts
    if left * (1 if generated else ESTIMATE_MARGIN) < needed:
        return [
            f"budget.queries: {config.budget.queries} queries need {needed} prompts, prompts.sources give "
            f"{'' if generated else 'about '}{max(0, left)} beside the held-out ones: lower it, or "
            f"{'raise the sizes' if generated else 'add data'}"
        ]
    return []


def affordable(config: RunConfig) -> list[str]:
    """Tokens and money of each stage cover the worst case of one prompt at least."""
    budget, sampling = config.budget, config.sampling.teacher
    read, beside = config.prompts.max_prompt_tokens, config.auxiliary
    worst = Amount(1, read, sampling.max_tokens) * sampling.samples
    if beside:
        worst += Amount(1, read + beside.template_tokens, beside.max_tokens)
    parts = pairwise([0.0, *(config.peers.parts() if config.peers else [1.0])])
    found = []
    for teacher, (before, after) in zip(config.teachers, parts, strict=True):
        # One that is given nothing covers nothing; one that is given something covers one prompt. By source each may be
        # given all.
        part = after if config.peers and isinstance(config.peers.routing, BySource) else after - before
        share = min(budget.warmup_share or 1, 1 - budget.warmup_share) * part
        for unit in ("tokens", "money") if share else ():
            other, price = "money" if unit == "tokens" else "tokens", budget.price_of(teacher)
            caps = caps_of(budget.model_copy(update={other: None, "price": price}))
            if getattr(budget, unit) is not None and not caps.cover(worst, share):
                found.append(
                    f"budget.{unit}: {share:.0%} of {getattr(budget, unit):,} do not cover one prompt of {teacher}, "
                    f"which may take {worst.tokens:,} tokens: raise it, or lower sampling.teacher.max_tokens"
                )
    return found


def unasked(config: RunConfig) -> list[str]:
    """Candidates are more than those that the teacher is asked about, as far as they can be counted."""
    known, asked = candidates(config), config.selected_prompts
    if known and known <= asked:
        fix = "raise signals.candidates" if config.signals.candidates else "lower budget.queries, or add data"
        return [f"mentor: the teacher is asked about all {known} candidates, none is left: {fix}"]
    return []


def places(config: RunConfig, root: str) -> list[str]:
    address = config.resources.ray_address
    local = address is None or any(host in address for host in ("127.0.0.1", "localhost", "[::1]"))
    if "://" not in root and not local:
        return [
            f"--root: {root!r} is a folder of this machine, the cluster {address} cannot see it: use s3://bucket/prefix"
        ]
    return []


def capacity(config: RunConfig, root: str, needs: Estimate) -> list[str]:
    """Disk and memory of this machine, where this machine does the work."""
    found = []
    if "://" not in root:
        place = Path(root).absolute()
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free / GIB
        if free < needs.disk_gib:
            found.append(
                f"--root: {root!r} has {free:.1f} GiB free, the run takes about {needs.disk_gib:.1f}: free some"
            )
    if config.resources.ray_address is None and not on_gpu(config):
        memory = psutil.virtual_memory().available / GIB
        if memory < needs.memory_gib:
            found.append(
                f"resources: {memory:.1f} GiB of memory are free, the run takes about {needs.memory_gib:.1f}: set "
                "resources.release_engines, lower engines.*.kv_cache_gib, or use smaller models"
            )
        if config.resources.gpus_per_worker:
            found.append("resources.gpus_per_worker: 1, but this machine has no GPU: set 0, or device: gpu")
    if config.resources.ray_address is None and config.resources.train_workers > (os.cpu_count() or 1):
        workers = config.resources.train_workers
        found.append(f"resources.train_workers: {workers} on {os.cpu_count()} cores: lower it")
    return found


def lengths(config: RunConfig) -> list[str]:
    """Training rows fit the longest prompt and response."""
    found = []
    prompt = config.prompts.max_prompt_tokens
    for name, settings in config.trainings.items():
        response = settings.method.max_new_tokens
        if prompt + response > settings.max_length:
            found.append(
                f"{name}.max_length: {settings.max_length} is below prompts.max_prompt_tokens {prompt} + "
                f"max_new_tokens {response}: raise it"
            )
    if prompt + config.evaluate.max_tokens > config.engines.student.max_model_len:
        found.append(
            f"evaluate.max_tokens: {config.evaluate.max_tokens} + prompts.max_prompt_tokens {prompt} exceed "
            f"engines.student.max_model_len {config.engines.student.max_model_len}: raise the latter"
        )
    return found

"""Everything that can be known to go wrong before anything expensive starts. One line a problem: field, value, fix."""

import os
import shutil
import uuid
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from pydantic import ValidationError

from flows.estimate import GIB, Estimate
from flows.reach import reach
from flows.story import on_gpu
from infra.files import list_files
from infra.store import open_store
from tasks.config import RunConfig
from tasks.config.evaluation import Evaluation
from tasks.config.models import GgufModel, HuggingFaceModel, OpenAIModel, PromotedModel, PrunedModel, StudentSource
from tasks.config.prompts import InboxSource, ReasoningGymSource
from tasks.ledger import Amount, caps_of
from tasks.models import ROLES, identity
from tasks.sources import check as check_source
from tasks.verify import check_verifier


def problem(where: str, check: Callable[[], Any]) -> list[str]:
    """The check's complaint as one line, prefixed with where it was found."""
    try:
        check()
    except (ValueError, OSError, ValidationError) as error:
        return [f"{where}: {' '.join(str(error).split())}"]
    return []


def readable(config: RunConfig, root: str) -> list[str]:
    """Store, models and sources are there."""
    found = problem("--root", partial(writable, root))
    for role in ROLES:
        found += problem(f"models.{role}", partial(identity, getattr(config.models, role)))
    if isinstance(config.models.teacher, OpenAIModel):
        found += problem("models.teacher", partial(reach, config.models.teacher))
    found += sources_readable(config)
    if config.prompts.verifier != "auto":
        found += problem("prompts.verifier", partial(check_verifier, config.prompts.verifier))
    return list(dict.fromkeys(found))


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


def preflight(config: RunConfig, root: str, needs: Estimate) -> list[str]:
    """Combinations, capacities and the models' own limits."""
    return [
        *places(config, root),
        *enough(config),
        *affordable(config),
        *capacity(config, root, needs),
        *lengths(config),
        *(text_only(config) if config.text_only else distributions(config)),
    ]


def enough(config: RunConfig) -> list[str]:
    """Generated problems are as many as the settings say; files are counted by the prompts stage."""
    sources = config.prompts.sources
    generated = [task.size for source in sources if isinstance(source, ReasoningGymSource) for task in source.tasks]
    aside = 0 if config.prompts.heldout_sources else config.prompts.heldout
    if config.recurring is None and all(isinstance(source, ReasoningGymSource) for source in sources):
        left = sum(generated) - aside
        needed = config.warmup_prompts + config.selected_prompts
        if needed > left:
            return [
                f"budget.queries: {config.budget.queries} queries need {needed} prompts, prompts.sources give {left} "
                "beside the held-out ones: lower it, or raise the sizes"
            ]
    return []


def affordable(config: RunConfig) -> list[str]:
    """Tokens and money of each stage cover the worst case of one prompt at least."""
    budget, sampling = config.budget, config.sampling.teacher
    worst = Amount(1, config.prompts.max_prompt_tokens, sampling.max_tokens) * sampling.samples
    found = []
    for unit in ("tokens", "money"):
        caps = caps_of(budget.model_copy(update={"money": None} if unit == "tokens" else {"tokens": None}))
        share = min(budget.warmup_share, 1 - budget.warmup_share)
        if getattr(budget, unit) is not None and not caps.cover(worst, share):
            found.append(
                f"budget.{unit}: {share:.0%} of {getattr(budget, unit):,} do not cover one prompt, which may take "
                f"{worst.tokens:,} tokens: raise it, or lower sampling.teacher.max_tokens"
            )
    return found


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
    for name, settings in (("warmup", config.warmup), ("train", config.train)):
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


def origin(source: StudentSource) -> HuggingFaceModel | GgufModel:
    """Where a model's tokenizer and vocabulary come from."""
    if isinstance(source, PromotedModel):
        return origin(source.first)
    if isinstance(source, HuggingFaceModel | GgufModel):
        return source
    return source.of if isinstance(source, PrunedModel) else source.tokenizer_of


def text_only(config: RunConfig) -> list[str]:
    """What an endpoint cannot do: it shows no distributions, and is asked for annotations only."""
    found = [
        f"{name}.method: {settings.method.type} compares distributions, which models.teacher (openai) does not show: "
        "use sft or seqkd, or a teacher that runs here"
        for name, settings in (("warmup", config.warmup), ("train", config.train))
        if settings.method.compares
    ]
    if config.sampling.distributions:
        found.append("sampling.distributions: models.teacher (openai) shows none: leave it out")
    if config.evaluate.reference == "teacher":
        found.append("evaluate.reference: teacher would ask models.teacher (openai) outside the budget: set source")
    return found


def distributions(config: RunConfig) -> list[str]:
    """For methods that compare distributions: one token map, one width of logits, one end of sequence."""
    assert not isinstance(config.models.teacher, OpenAIModel)
    teacher, student = origin(config.models.teacher), origin(config.models.student)
    comparing = [settings.method.type for settings in (config.warmup, config.train) if settings.method.compares]
    if not comparing or teacher == student:
        return []
    ours, theirs = vocabulary(student), vocabulary(teacher)
    found = []
    method = comparing[-1]
    if ours["tokens"] != theirs["tokens"]:
        found.append(
            f"models.student: its tokenizer differs from the teacher's, and train.method {method} compares "
            "distributions: take a student of the teacher's family, or train.method sft"
        )
    elif ours["width"] != theirs["width"]:
        found.append(
            f"models.student: its logits are {ours['width']} wide, the teacher's {theirs['width']} (padded): "
            "resize one model's embeddings to the other's, or use train.method sft"
        )
    elif ours["end"] != theirs["end"]:
        found.append(
            f"models.student: it ends with token {ours['end']}, the teacher with {theirs['end']}: set eos_token_id in "
            "its generation_config.json"
        )
    return found


def vocabulary(source: HuggingFaceModel | GgufModel) -> dict[str, Any]:
    """Token map, width of the logits, and end-of-sequence ids, without loading weights."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from tasks.models import gguf_path

    if isinstance(source, GgufModel):
        path = gguf_path(source)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        end = config.eos_token_id
    else:
        tokenizer = AutoTokenizer.from_pretrained(source.id, revision=source.revision)
        config = AutoConfig.from_pretrained(source.id, revision=source.revision).get_text_config()
        try:
            end = GenerationConfig.from_pretrained(source.id, revision=source.revision).eos_token_id
        except OSError:
            end = config.eos_token_id
    return {"tokens": tokenizer.get_vocab(), "width": config.vocab_size, "end": end}

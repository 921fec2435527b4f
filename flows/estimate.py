"""What a run takes, before it runs: rows, tokens, seconds, memory. Orders of magnitude, from sizes and the machine.

A decoder does about 2 floating-point operations a parameter and token forward, 6 in training. Rates are what a machine
sustains, not its peak: the CPU's are rounded from short runs on two cores, the GPU's are assumptions that no run has
checked. In small runs starts outweigh the work: what a job costs before it works is the quickstart's, on two cores.
"""

import os
from dataclasses import dataclass, field

from flows.story import on_gpu
from tasks.config import RunConfig
from tasks.config.models import FreshModel, ModelSource, OpenAIModel, PrunedModel
from tasks.config.prompts import ReasoningGymSource
from tasks.config.train import TrainConfig
from tasks.models import ROLES, parameters_on_disk

GIB = 1 << 30
DECODE_FLOPS_PER_CORE = 20e9
TRAIN_FLOPS_PER_CORE = 60e9
DECODE_FLOPS_PER_GPU = 20e12
TRAIN_FLOPS_PER_GPU = 100e12
# An endpoint's time to write an answer.
ANSWER_SECONDS = 3.0
START_SECONDS = {"cpu": 30.0, "gpu": 60.0}
# Prompts and responses are seldom as long as they may be.
FILL = 0.4
# Interpreter, torch and vLLM of one engine or worker beside its weights.
PROCESS_GIB = 1.0
SERVICES_GIB = 2.5


@dataclass
class Cost:
    """Of one stage."""

    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Estimate:
    """Of a run."""

    stages: dict[str, Cost] = field(default_factory=dict)
    teacher_queries: int = 0
    teacher_tokens: int = 0  # at most
    teacher_money: str = ""  # at most
    memory_gib: float = 0.0
    disk_gib: float = 0.0


def parameters(source: ModelSource | OpenAIModel) -> float:
    """Number of parameters, from file sizes or the shape; 0 if unknown."""
    if isinstance(source, OpenAIModel):
        return 0.0
    if isinstance(source, FreshModel):
        return source.layers * (4 * source.hidden_size**2 + 3 * source.hidden_size * source.intermediate_size)
    if isinstance(source, PrunedModel):
        return parameters(source.of) * 0.4
    return parameters_on_disk(source)


def candidates(config: RunConfig) -> int:
    """Prompts the student is sampled on, as far as sizes are known before reading."""
    known = sum(
        task.size
        for source in config.prompts.sources
        if isinstance(source, ReasoningGymSource)
        for task in source.tasks
    )
    left = max(0, known - config.prompts.heldout - config.warmup_prompts)
    return min(config.signals.candidates or left, left) if known else config.signals.candidates or 0


def estimate(config: RunConfig) -> Estimate:
    """The whole run's costs by stage."""
    gpu = on_gpu(config)
    cores = os.cpu_count() or 1
    decode = DECODE_FLOPS_PER_GPU if gpu else DECODE_FLOPS_PER_CORE * cores
    train = TRAIN_FLOPS_PER_GPU * config.resources.train_workers if gpu else TRAIN_FLOPS_PER_CORE * cores
    start = START_SECONDS["gpu" if gpu else "cpu"]
    teacher, assistant, student = (
        parameters(getattr(config.models, role)) for role in ("teacher", "assistant", "student")
    )
    replicas, longest = config.engines.teacher.replicas, config.prompts.max_prompt_tokens
    result = Estimate()

    def sample(name: str, prompts: int, samples: int, length: int, size: float) -> None:
        tokens = int(prompts * samples * length * FILL)
        result.stages[name] = Cost(prompts * samples, tokens, start + 2 * size * tokens / decode / replicas)

    def annotate(name: str, prompts: int, samples: int, length: int) -> None:
        sample(name, prompts, samples, length, teacher)
        if isinstance(source := config.models.teacher, OpenAIModel):
            service = source.service
            pace = 60 / service.requests_per_minute if service.requests_per_minute else 0.0
            each = max(pace, ANSWER_SECONDS / service.concurrency)
            result.stages[name].seconds = start + result.stages[name].rows * each

    def score(name: str, annotations: int) -> None:
        """The TA reads, and answers itself where annotations have to agree."""
        agreement = config.signals.keep.agreement
        sample(name, annotations, 1, longest + (agreement.max_tokens if agreement else 0), assistant)

    def fit(name: str, settings: TrainConfig) -> None:
        tokens = int(settings.steps * settings.batch_size * settings.max_length * FILL)
        flops = 6 * student * tokens
        method = settings.method
        if method.asks_teacher:
            flops += 2 * teacher * tokens
        rollout = method.rollout_share * settings.steps * settings.batch_size * method.max_new_tokens * FILL
        asked = teacher if method.type in ("switch", "skd", "minillm") else 0
        flops += 2 * (student + asked) * rollout * train / decode
        result.stages[name] = Cost(settings.steps, tokens, 2 * start + flops / train)

    warmup, rest = config.warmup_prompts, config.selected_prompts
    asked, heldout = candidates(config), config.prompts.heldout
    written, own = config.sampling.teacher, config.sampling.student
    annotate("warmup-annotate", warmup, written.samples, written.max_tokens)
    score("warmup-keep", warmup)
    fit("warmup-train", config.warmup)
    sample("student-sample", asked, own.samples, own.max_tokens, student)
    sample("select", asked, 1, longest, assistant)
    annotate("annotate", rest, written.samples, written.max_tokens)
    score("keep", rest)
    fit("train", config.train)
    if beside := config.auxiliary:
        annotate("warmup-auxiliary", warmup, 1, beside.max_tokens)
        annotate("auxiliary", rest, 1, beside.max_tokens)
    seeds, length = len(config.evaluate.seeds), config.evaluate.max_tokens
    sample("evaluate-before", heldout, seeds, length, teacher + student)
    sample("evaluate-after", heldout, seeds, length, 2 * student)
    for name, starts in (("models", 2), ("prompts", 1), ("report", 1)):
        result.stages[name] = Cost(seconds=starts * start)

    result.teacher_queries = (warmup + rest) * config.queries_per_prompt
    prompts = warmup + rest
    read, answered = (prompts * written.samples * most for most in (longest, written.max_tokens))
    if beside:
        read, answered = read + prompts * (longest + beside.template_tokens), answered + prompts * beside.max_tokens
    result.teacher_tokens = min(read + answered, config.budget.tokens or read + answered)
    if (price := config.budget.price) is not None:
        most = float(price.of(read, answered))
        result.teacher_money = f"{min(most, config.budget.money or most):,.4g} {price.currency}"
    width = 2 if gpu else 4
    # Roles with the same model and settings share their engines.
    serving = {
        repr((source, engine)): (parameters(source) * width / GIB + PROCESS_GIB + engine.kv_cache_gib) * engine.replicas
        for source, engine in ((getattr(config.models, role), getattr(config.engines, role)) for role in ROLES)
        if not isinstance(source, OpenAIModel)
    }
    engines = sum(serving.values())
    beside = teacher if config.train.method.asks_teacher else 0
    training = (16 * student + width * beside) / GIB + 2 * PROCESS_GIB
    result.memory_gib = SERVICES_GIB + (
        max(engines, training) if config.resources.release_engines else engines + training
    )
    result.disk_gib = (4 * (teacher + student) + 12 * student * (1 + config.train.keep_checkpoints)) / GIB + 0.1
    return result

"""What a run takes, before it runs: rows, tokens, seconds, memory. Orders of magnitude, from sizes and the machine.

A decoder does about 2 floating-point operations a parameter and token forward, 6 in training. Rates are what a machine
sustains, not its peak: the CPU's are rounded from short runs on two cores, the GPU's are assumptions that no run has
checked. In small runs starts outweigh the work: what a job costs before it works is the quickstart's, on two cores.
"""

import os
from dataclasses import dataclass, field
from itertools import pairwise

from flows.placement import placement_notes, placements
from flows.story import on_gpu
from tasks.config import RunConfig
from tasks.config.models import FreshModel, OpenAIModel, PromotedModel, PrunedModel, StudentSource
from tasks.config.peers import FIRST, BySource, Everyone
from tasks.config.prompts import ReasoningGymSource
from tasks.config.train import TrainConfig
from tasks.models import parameters_on_disk

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
    notes: list[str] = field(default_factory=list)  # where training's models lie


def parameters(source: StudentSource | OpenAIModel) -> float:
    """Number of parameters, from file sizes or the shape; 0 if unknown."""
    if isinstance(source, OpenAIModel):
        return 0.0
    if isinstance(source, PromotedModel):
        return parameters(source.first)
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
    return min(config.candidates or left, left) if known else config.candidates or 0


def answering(config: RunConfig) -> list[float]:
    """Of the prompts that are asked, each teacher's share: all of them where everyone answers."""
    peers = config.peers
    if peers is None or isinstance(peers.routing, Everyone):
        return [1.0] * len(config.teachers)
    if isinstance(peers.routing, BySource):
        # What each source has is known once prompts are read.
        return [1 / len(config.teachers)] * len(config.teachers)
    return [after - before for before, after in pairwise([0.0, *peers.parts()])]


def estimate(config: RunConfig) -> Estimate:
    """The whole run's costs by stage."""
    gpu = on_gpu(config)
    cores = os.cpu_count() or 1
    decode = DECODE_FLOPS_PER_GPU if gpu else DECODE_FLOPS_PER_CORE * cores
    train = TRAIN_FLOPS_PER_GPU * config.resources.train_workers if gpu else TRAIN_FLOPS_PER_CORE * cores
    start = START_SECONDS["gpu" if gpu else "cpu"]
    sizes = {role: parameters(model.source) for role, model in config.served.items()}
    teacher, assistant, student = (sizes[role] for role in ("teacher", "assistant", "student"))
    replicas, longest = config.engines.teacher.replicas, config.prompts.max_prompt_tokens
    result = Estimate()

    def sample(name: str, prompts: int, samples: int, length: int, size: float) -> None:
        tokens = int(prompts * samples * length * FILL)
        result.stages[name] = Cost(prompts * samples, tokens, start + 2 * size * tokens / decode / replicas)

    def ask(name: str, role: str, prompts: int, samples: int, length: int) -> None:
        sample(name, prompts, samples, length, sizes[role])
        if isinstance(source := config.served[role].source, OpenAIModel):
            service = source.service
            pace = 60 / service.requests_per_minute if service.requests_per_minute else 0.0
            each = max(pace, ANSWER_SECONDS / service.concurrency)
            result.stages[name].seconds = start + result.stages[name].rows * each

    def annotate(name: str, prompts: int) -> None:
        for role, part in zip(config.teachers, answering(config), strict=True):
            own = name if role == FIRST else f"{name}-{role}"
            ask(own, role, round(prompts * part), written.samples, written.max_tokens)
        if config.peers:
            here = [role for role in config.teachers if not isinstance(config.served[role].source, OpenAIModel)]
            # Each reads what the others wrote.
            parts = dict(zip(config.teachers, answering(config), strict=True))
            reviews = prompts * sum(sum(parts.values()) - parts[role] for role in here) if config.peers.review else 0
            size = max((sizes[role] for role in here), default=0.0)
            reviewed = round(reviews * written.samples)
            sample(name.replace("annotate", "review"), reviewed, 1, longest + written.max_tokens, size)

    def score(name: str, prompts: int, answers: int) -> None:
        """The TA reads, and answers itself where annotations have to agree."""
        agreement = config.signals.keep.agreement
        sample(name, prompts, answers, longest + (agreement.max_tokens if agreement else 0), assistant)

    def fit(name: str, settings: TrainConfig, size: float = student) -> None:
        tokens = int(settings.steps * settings.batch_size * settings.max_length * FILL)
        flops = 6 * size * tokens
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
    if config.warms_up:
        annotate("warmup-annotate", warmup)
        score("warmup-keep", warmup, config.answers_per_prompt)
        fit("warmup-train", config.warmup)
    sample("student-sample", asked, own.samples, own.max_tokens, student)
    sample("select", asked, 1, longest, assistant)
    annotate("annotate", rest)
    score("keep", rest, config.answers_per_prompt)
    if mentor := config.mentor:
        further = min(mentor.prompts, max(0, asked - rest) or mentor.prompts)
        fit("mentor-train", mentor.train, sizes["mentor"])
        wrote = mentor.sampling
        sample("mentor-annotate", further, wrote.samples, wrote.max_tokens, sizes["mentor"])
        score("mentor-keep", further * wrote.samples, 1)
    fit("train", config.train)
    if further_asked := config.auxiliary:
        if config.warms_up:
            ask("warmup-auxiliary", FIRST, warmup, 1, further_asked.max_tokens)
        ask("auxiliary", FIRST, rest, 1, further_asked.max_tokens)
    seeds, length = len(config.evaluate.seeds), config.evaluate.max_tokens
    sample("evaluate-before", heldout, seeds, length, teacher + student)
    sample("evaluate-after", heldout, seeds, length, 2 * student)
    for name, starts in (("models", 2), ("prompts", 1), ("report", 1)):
        result.stages[name] = Cost(seconds=starts * start)

    prompts = warmup + rest
    result.teacher_queries = prompts * config.queries_per_prompt
    read, answered = (prompts * config.answers_per_prompt * most for most in (longest, written.max_tokens))
    targets = (0, 0)
    if further_asked:
        targets = prompts * (longest + further_asked.template_tokens), prompts * further_asked.max_tokens
    tokens = read + answered + sum(targets)
    result.teacher_tokens = min(tokens, config.budget.tokens or tokens)
    if config.budget.price is not None:
        prices = [config.budget.price_of(role) or config.budget.price for role in config.teachers]
        # What it would come to if all were asked of one teacher.
        alone = [float(price.of(read, answered)) for price in prices]
        parts = answering(config)
        most = sum(own * part for own, part in zip(alone, parts, strict=True)) / sum(parts)
        if config.peers and isinstance(config.peers.routing, BySource):
            most = max(alone)
        most += float(config.budget.price.of(*targets))
        result.teacher_money = f"{min(most, config.budget.money or most):,.4g} {config.budget.price.currency}"
    width = 2 if gpu else 4
    # Roles with the same model and settings share their engines.
    serving = {
        repr((model.source, model.engine)): (
            (sizes[role] * width / GIB + PROCESS_GIB + model.engine.kv_cache_gib) * model.engine.replicas
        )
        for role, model in config.served.items()
        if not isinstance(model.source, OpenAIModel)
    }
    engines = sum(serving.values())
    between = sizes.get("mentor", 0.0)
    placed = placements(config, sizes)
    result.notes = placement_notes(config, sizes, placed)
    # Each worker holds its own, beside the stage's process.
    worker = max(chosen.bytes for chosen in placed.values()) / GIB + PROCESS_GIB
    training = config.resources.train_workers * worker + PROCESS_GIB
    if any(chosen.teacher == "served" for chosen in placed.values()):
        reader = config.served["teacher"]
        training += serving[repr((reader.source, reader.engine))]
    result.memory_gib = SERVICES_GIB + (
        max(engines, training) if config.resources.release_engines else engines + training
    )
    trained = 12 * student * (1 + config.train.keep_checkpoints)
    trained += 12 * between * (1 + config.mentor.train.keep_checkpoints) if config.mentor else 0
    result.disk_gib = (4 * (teacher + student) + trained) / GIB + 0.1
    return result

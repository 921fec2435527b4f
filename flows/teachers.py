"""The teachers' part of the story: they answer in turn within one budget, and read what the others wrote."""

from typing import Any

from flows.story import Pipeline
from tasks.config.models import OpenAIModel
from tasks.config.peers import FIRST
from tasks.ledger import caps_between


def annotate(
    pipeline: Pipeline,
    name: str,
    shares: tuple[float, float],
    before: dict[str, str],
    settings: dict[str, Any],
    models: str,
    prompts: str,
) -> dict[str, str]:
    """Each teacher answers, as far as the budget goes between two shares of it; the samples by stage, in that order.
    ``before``: the stage that was charged to it last."""
    config, made = pipeline.config, {}
    parts = config.peers.parts() if config.peers else [1.0]
    for teacher, caps in zip(config.teachers, caps_between(config.budget, *shares, parts), strict=True):
        first, source = teacher == FIRST, config.served[teacher].source
        if caps.money is not None:
            caps = caps.model_copy(update={"price": config.budget.price_of(teacher)})
        own = {
            **settings,
            "role": teacher,
            "engine": teacher,
            "sampling": config.sampling.teacher.model_dump(mode="json"),
            # Engine and training model are compared where training asks this teacher.
            "logprobs": first and config.train.method.compares,
            "distributions": config.sampling.distributions and config.sampling.distributions.model_dump(mode="json"),
            "caps": caps.model_dump(mode="json"),
            "charged_by": next(iter(before), None),
            "prompt_tokens": None if isinstance(source, OpenAIModel) else config.prompts.max_prompt_tokens,
            "seed": config.seed,
        }
        if config.peers:
            routing = config.peers.routing.model_dump(mode="json")
            own["route"] = {"teacher": teacher, "teachers": config.teachers, "routing": routing}
        stage = name if first else f"{name}-{teacher}"
        made[stage] = pipeline.stage(stage, "tasks.sample", own, models=models, prompts=prompts, **before)
        before = {stage: made[stage]}
    return made


def together(
    pipeline: Pipeline, name: str, samples: dict[str, str], settings: dict[str, Any], models: str, prompts: str
) -> str:
    """One teacher's samples as they are; those of several side by side, with what each says of the others'."""
    config = pipeline.config
    if not config.peers:
        return next(iter(samples.values()))
    settings = {**settings, "samples": dict(zip(config.teachers, samples, strict=True))}
    if config.peers.review:
        # Endpoints are asked for annotations only.
        here = [name for name in config.teachers if not isinstance(config.served[name].source, OpenAIModel)]
        settings |= {"reviewers": here, "confidence": config.signals.confidence.model_dump(mode="json")}
    return pipeline.stage(name, "tasks.review", settings, models=models, prompts=prompts, **samples)


def last(stages: dict[str, str]) -> dict[str, str]:
    """Of the stages that were charged to the budget the last one; none of none."""
    return dict(list(stages.items())[-1:])

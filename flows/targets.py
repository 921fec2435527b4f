"""The auxiliary targets' part of the story: what the teacher is asked beside the answers, charged behind them."""

from typing import Any

from flows.story import Pipeline
from tasks.ledger import caps_of


def auxiliary(
    pipeline: Pipeline,
    name: str,
    share: float,
    before: dict[str, str],
    settings: dict[str, Any],
    models: str,
    prompts: str,
) -> dict[str, str]:
    """The teacher writes targets, as far as that share of the budget goes; the result by its stage, none where nothing
    is asked. ``before``: the stage that was charged to the budget last."""
    config = pipeline.config
    if not (asked := config.auxiliary):
        return {}
    sampling, kept = config.sampling.teacher, config.sampling.distributions
    own = {
        **settings,
        "role": "auxiliary",
        "engine": "teacher",
        "template": asked.template,
        "weight": asked.weight,
        "sampling": sampling.model_dump(mode="json") | {"max_tokens": asked.max_tokens, "samples": 1},
        "distributions": kept and kept.model_dump(mode="json"),
        "drop_truncated": config.signals.keep.drop_truncated,
        "caps": caps_of(config.budget, share).model_dump(mode="json"),
        "charged_by": next(iter(before)),
        "prompt_tokens": None if config.text_only else config.prompts.max_prompt_tokens + asked.template_tokens,
        "seed": config.seed,
    }
    return {name: pipeline.stage(name, "tasks.auxiliary", own, models=models, prompts=prompts, **before)}

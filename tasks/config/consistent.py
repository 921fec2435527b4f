"""Whether the parts of a run's settings fit each other: all that can be known without looking at files or machines."""

from typing import TYPE_CHECKING, Any

from tasks.config.models import OpenAIModel, PromotedModel
from tasks.config.prompts import InboxSource
from tasks.config.train import TrainConfig

if TYPE_CHECKING:
    from tasks.config.run import RunConfig


def check(config: "RunConfig") -> None:
    """ValueError where parts of the settings do not fit each other."""
    if config.leaves_a_stage_none:
        raise ValueError(
            f"budget.warmup_share {config.budget.warmup_share} of {config.budget.queries} queries leaves a stage none:"
            " raise budget.queries"
        )
    for name, settings in config.trainings.items():
        method: Any = settings.method
        if method.compares and method.annotated == "stored" and not config.sampling.distributions:
            raise ValueError(
                f"{name}.method.annotated stored needs the teacher's distributions: set sampling.distributions "
                "({type: top} will do), or annotated live"
            )
        if method.asks_teacher and config.resources.placement.teacher == "served":
            _can_be_served(config, name, settings)
    _kept(config)
    _asked_beside(config)
    rest = config.selected_prompts
    if config.signals.candidates is not None and config.signals.candidates < rest:
        raise ValueError(
            f"signals.candidates {config.signals.candidates} are fewer than the {rest} prompts that are chosen of "
            "them: raise it, or lower budget.queries"
        )
    _recurs(config)
    _peers_fit(config)
    _written(config)
    _scored(config)


def _written(config: "RunConfig") -> None:
    """Who writes has room for the longest prompt and the longest answer."""
    writing = [("student", "sampling.student", config.sampling.student)]
    writing += [(role, "sampling.teacher", config.sampling.teacher) for role in config.teachers]
    writing += [("mentor", "mentor.sampling", config.mentor.sampling)] if config.mentor else []
    for role, field, sampling in writing:
        model = config.served[role]
        if isinstance(model.source, OpenAIModel):
            continue
        if config.prompts.max_prompt_tokens + sampling.max_tokens > model.engine.max_model_len:
            raise ValueError(
                f"{model.engine_field}.max_model_len {model.engine.max_model_len} is below "
                f"prompts.max_prompt_tokens {config.prompts.max_prompt_tokens} + {field}.max_tokens "
                f"{sampling.max_tokens}: raise it"
            )


def _can_be_served(config: "RunConfig", name: str, settings: TrainConfig) -> None:
    """A training whose teacher engines serve asks it for blocks of no more than they read."""
    if not settings.method.in_blocks:
        raise ValueError(f"{name}.method.decoder: a teacher that is served scores blocks: set blockwise")
    most = config.served["teacher"].engine.max_model_len
    if most < settings.max_length:
        raise ValueError(
            f"engines.teacher.max_model_len {most} is below {name}.max_length {settings.max_length}, which a "
            "teacher that is served reads: raise it"
        )


def _peers_fit(config: "RunConfig") -> None:
    """What several teachers ask of the rest of the settings."""
    if config.peers is None:
        if config.budget.prices:
            raise ValueError("budget.prices are those of further teachers, and there are none: set price")
        return
    if config.auxiliary:
        raise ValueError("auxiliary with peers: its targets are one teacher's: leave one of both out")
    if config.sampling.distributions:
        raise ValueError(
            "sampling.distributions with peers: methods learn the first teacher's distributions, also on what the "
            "others wrote: leave it out, and set annotated live"
        )
    for name in config.budget.prices or {}:
        if name not in config.peers.names[1:]:
            raise ValueError(f"budget.prices: no further teacher is called {name!r}: name those of peers.teachers")
    known = [config.models.teacher]
    for number, peer in enumerate(config.peers.teachers):
        if peer.model in known:
            raise ValueError(f"peers.teachers.{number}.model: {peer.name!r} is a teacher already, remove one")
        known.append(peer.model)
    if config.peers.review and sum(not isinstance(source, OpenAIModel) for source in known) < 2:
        raise ValueError("peers.review: endpoints review nothing, so it takes two teachers that run here: leave it out")


def _kept(config: "RunConfig") -> None:
    """What keeping needs of prompts, models and training."""
    keep, longest = config.signals.keep, config.prompts.max_prompt_tokens
    if keep.calibrate and config.prompts.verifier == "none":
        raise ValueError("signals.keep.calibrate needs known answers, and prompts.verifier is none: remove one")
    if keep.calibrate and not config.calibration_share:
        zero = next(name for name, training in config.trainings.items() if not training.validation_share)
        raise ValueError(f"signals.keep.calibrate needs validation prompts: raise {zero}.validation_share above 0")
    if keep.agreement and config.prompts.verifier == "none":
        raise ValueError("signals.keep.agreement compares final answers, and prompts.verifier is none: remove one")
    if config.signals.select.rule == "oracle" and config.prompts.verifier == "none":
        raise ValueError("signals.select.rule oracle needs known answers, and prompts.verifier is none: set signals")
    if keep.agreement and longest + keep.agreement.max_tokens > config.engines.assistant.max_model_len:
        raise ValueError(
            f"engines.assistant.max_model_len {config.engines.assistant.max_model_len} is below "
            f"prompts.max_prompt_tokens {longest} + signals.keep.agreement.max_tokens {keep.agreement.max_tokens}: "
            "raise it"
        )
    method: Any = config.train.method
    if keep.stand_in and method.compares and method.annotated == "stored":
        raise ValueError(
            "signals.keep.stand_in trains on text of the student, of which no distributions of the teacher are "
            "stored: set train.method.annotated live, or leave stand_in out"
        )


def _scored(config: "RunConfig") -> None:
    """Who gives answers a confidence has room for the longest prompt, the longest answer, and the question."""
    asked = config.signals.confidence.tokens
    if asked is None:
        return
    theirs, own = ("sampling.teacher", config.sampling.teacher), ("sampling.student", config.sampling.student)
    mentors = [("mentor.sampling", config.mentor.sampling)] if config.mentor else []
    reads = {"assistant": [theirs, own, *mentors]}
    if config.peers and config.peers.review:
        reads |= {role: [theirs] for role in config.teachers}
    for role, writing in reads.items():
        model, (field, longest) = config.served[role], max(writing, key=lambda entry: entry[1].max_tokens)
        needed = config.prompts.max_prompt_tokens + longest.max_tokens + asked
        if not isinstance(model.source, OpenAIModel) and needed > model.engine.max_model_len:
            raise ValueError(
                f"{model.engine_field}.max_model_len {model.engine.max_model_len} is below "
                f"prompts.max_prompt_tokens {config.prompts.max_prompt_tokens} + {field}.max_tokens "
                f"{longest.max_tokens} + the question of signals.confidence, {asked} at most: raise it to {needed}"
            )


def _asked_beside(config: "RunConfig") -> None:
    """What an auxiliary target needs of engines and training, and what else only rows are made for."""
    beside, method = config.auxiliary, config.train.method
    for_rows = {"auxiliary": beside, "mentor": config.mentor, "signals.keep.stand_in": config.signals.keep.stand_in}
    unused = [name for name, section in for_rows.items() if section]
    if unused and config.trains_on_rollouts_alone:
        raise ValueError(
            f"{unused[0]}: train.method {method.type} trains on rollouts alone, so its rows would only be made "
            f"and paid for: lower train.method.on_policy_share below 1, or leave {unused[0]} out"
        )
    if not beside:
        return
    needed = config.prompts.max_prompt_tokens + beside.template_tokens + beside.max_tokens
    if not config.text_only and needed > config.engines.teacher.max_model_len:
        raise ValueError(
            f"engines.teacher.max_model_len {config.engines.teacher.max_model_len} is below "
            f"prompts.max_prompt_tokens {config.prompts.max_prompt_tokens} + auxiliary.template's "
            f"{beside.template_tokens} at most + auxiliary.max_tokens {beside.max_tokens}: raise it"
        )


def _recurs(config: "RunConfig") -> None:
    """What only makes sense in runs that follow each other, and what does not make sense in them."""
    if any(isinstance(source, InboxSource) for source in config.prompts.heldout_sources):
        raise ValueError(
            "prompts.heldout_sources: an inbox gives prompts to learn from: leave it out, held-out prompts are set "
            "aside of the sources"
        )
    if config.recurring is None:
        if any(isinstance(source, InboxSource) for source in config.prompts.sources):
            raise ValueError("prompts.sources: an inbox needs the section recurring: add it, {} will do")
        if isinstance(config.models.student, PromotedModel):
            raise ValueError("models.student: type promoted needs the section recurring: add it, {} will do")

"""The settings of a whole run: one YAML file."""

from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from tasks.config.auxiliary import Auxiliary
from tasks.config.base import Config, absent
from tasks.config.budget import Budget
from tasks.config.document import parse, read_document
from tasks.config.evaluate import EvaluateConfig, PromoteConfig
from tasks.config.mentor import Mentor
from tasks.config.methods import Sft
from tasks.config.models import Engines, Models, OpenAIModel, PromotedModel
from tasks.config.peers import FIRST, Everyone, Peers
from tasks.config.placement import Placement
from tasks.config.prompts import InboxSource, PromptsConfig
from tasks.config.recurring import Recurring
from tasks.config.served import Served, served
from tasks.config.signals import Distributions, Sampling, Signals
from tasks.config.trackers import Trackers
from tasks.config.train import TrainConfig

NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"

# Settings that change no result, only how it is come by: neither runs nor results are named by them.
OPERATIONAL: Any = {
    "resources": True,
    "trackers": True,
    "engines": True,
    "device": True,
    "budget": {"spending_factor": True, "approve_above": True},
    "models": {"teacher": {"service": True, "key_variable": True}},
    "peers": {"teachers": {"__all__": {"engine": True, "model": {"service": True, "key_variable": True}}}},
    "mentor": {"engine": True},
}


class SamplingConfig(Config):
    """How teacher and student write when they are sampled."""

    teacher: Sampling = Sampling()
    """Annotation."""
    student: Sampling = Sampling(temperature=0.7, samples=5)
    """Self-consistency samples."""
    distributions: Distributions | None = None
    """Keep the teacher's distributions with its annotations, for methods that train on stored ones."""
    shard_size: int = Field(default=256, ge=1)
    """Prompts of one shard: what is redone at most after a crash."""


class Resources(Config):
    """What a run may take. Nothing here changes a result."""

    ray_address: str | None = None
    """Address of a Ray cluster's job server (http://…:8265); absent: a Ray head is started on this machine."""
    train_workers: int = Field(default=1, ge=1, le=1024)
    """Training workers."""
    min_train_workers: int | None = Field(default=None, ge=1, le=1024)
    """Training begins, and goes on from its last checkpoint after a node was lost, with so many workers where the
    cluster has room for no more, and grows with it; absent: it waits for all of them."""
    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    """GPUs of a training worker: 0 on CPU."""
    placement: Placement = Placement()
    """Where the models of training lie."""
    release_engines: bool = False
    """End the engines before training and load them again after it: for machines where both do not fit."""
    engine_room: str | None = Field(default=None, pattern=NAME)
    """Name of an engine room that is open on the cluster and stays open behind the run, as a series of runs shares it;
    absent: the run opens its own."""
    stage_deadline_minutes: float = Field(default=1440, gt=0)
    """A stage that runs longer is stopped, and the run fails unless ``retry_late_stages`` is set."""
    retry_late_stages: bool = False
    """Submit a stage past its deadline again, as one that died; it continues at the first missing part."""
    stage_retries: int = Field(default=2, ge=0, le=20)
    """How often a stage that died is submitted again; it continues at the first missing part."""
    gpu_slots: str | None = Field(default="switchyard-gpus", pattern=r"^[^/%&><]+$")
    """Prefect's global concurrency limit of which a run takes a slot a GPU, from its first stage that needs GPUs to its
    end. Where the server has no such limit, and on CPU, nothing waits."""

    @model_validator(mode="after")
    def _fewest_are_no_more(self) -> "Resources":
        if self.min_train_workers is not None and self.min_train_workers > self.train_workers:
            raise ValueError(
                f"min_train_workers {self.min_train_workers} is above train_workers {self.train_workers}: lower it"
            )
        return self


class RunConfig(Config):
    """A distillation, from prompts to a promoted student."""

    model_config = ConfigDict(title="Settings")

    name: str = Field(pattern=NAME)
    """Name of the run: lower-case letters, digits, hyphens."""
    seed: int = 0
    """Seed of everything that is drawn."""
    models: Models
    """Teacher, teaching assistant, student."""
    peers: Peers | None = Field(default=None, exclude_if=absent)
    """Further teachers beside ``models.teacher``. Absent: it is the only one."""
    prompts: PromptsConfig
    """What to learn from."""
    budget: Budget
    """What may be asked of the teacher."""
    sampling: SamplingConfig = SamplingConfig()
    """How teacher and student write."""
    signals: Signals = Signals()
    """What steers the queries and the filter."""
    auxiliary: Auxiliary | None = Field(default=None, exclude_if=absent)
    """What the teacher is asked beside each answer, for the student to learn too. Absent: nothing."""
    warmup: TrainConfig = TrainConfig(method=Sft(), steps=40)
    """Stage 1."""
    mentor: Mentor | None = Field(default=None, exclude_if=absent)
    """A model between teacher and student that annotates further prompts with soft labels. Absent: none."""
    train: TrainConfig = TrainConfig()
    """Stage 2."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Held-out measurement."""
    promote: PromoteConfig = PromoteConfig()
    """When the student is promoted."""
    recurring: Recurring | None = None
    """For runs that follow each other: new prompts only, replay, a budget by month. Absent: a run stands alone."""
    engines: Engines = Engines()
    """How models are served."""
    resources: Resources = Resources()
    """What the run may take."""
    trackers: Trackers = Trackers()
    """Where the run is followed beside Prefect."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where models run; ``auto``: GPUs if this machine, or the cluster, has them."""

    @property
    def text_only(self) -> bool:
        """Whether the teacher writes text and shows no distributions."""
        return isinstance(self.models.teacher, OpenAIModel)

    @property
    def served(self) -> dict[str, Served]:
        """Every model by its role, and how it is served."""
        return served(self)

    @property
    def teachers(self) -> list[str]:
        """Roles of the teachers that annotate. The first one is also asked in training."""
        return self.peers.names if self.peers else [FIRST]

    @property
    def calibration_share(self) -> float:
        """Share of the prompts that no training learns from, the mentor's included: each draws its own in one order."""
        return min(training.validation_share for training in self.trainings.values())

    @property
    def warms_up(self) -> bool:
        """Whether there is a stage 1."""
        return self.budget.warmup_share > 0

    @property
    def trainings(self) -> dict[str, TrainConfig]:
        """Every training by the place of its settings, the student's last one behind."""
        warmup = {"warmup": self.warmup} if self.warms_up else {}
        mentor = {"mentor.train": self.mentor.train} if self.mentor else {}
        return {**warmup, **mentor, "train": self.train}

    @property
    def leaves_a_stage_none(self) -> bool:
        """Whether a stage has no prompt to ask the teachers about."""
        return self.selected_prompts < 1 or (self.warms_up and self.warmup_prompts < 1)

    @property
    def answers_per_prompt(self) -> int:
        """Answers that a prompt is given: each sample of each teacher that it goes to."""
        everyone = self.peers and isinstance(self.peers.routing, Everyone)
        return self.sampling.teacher.samples * (len(self.teachers) if everyone else 1)

    @property
    def queries_per_prompt(self) -> int:
        """Teacher queries that a prompt takes: its answers, and an auxiliary target."""
        return self.answers_per_prompt + (self.auxiliary is not None)

    @property
    def warmup_prompts(self) -> int:
        """Prompts that teachers annotate for the warm-up."""
        return self.budget.warmup_queries // self.queries_per_prompt

    @property
    def selected_prompts(self) -> int:
        """Prompts that teachers annotate once the signals have chosen them."""
        return self.budget.queries // self.queries_per_prompt - self.warmup_prompts

    @property
    def candidates(self) -> int | None:
        """Prompts that the student is sampled on, None: all. As set; where nothing is chosen among them, no more than
        are annotated."""
        select = self.signals.select
        if self.signals.candidates is not None or select.rule != "random" or select.balance or select.source_share < 1:
            return self.signals.candidates
        return self.selected_prompts + (self.mentor.prompts if self.mentor else 0)

    @model_validator(mode="after")
    def _parts_fit(self) -> "RunConfig":
        if self.leaves_a_stage_none:
            raise ValueError(
                f"budget.warmup_share {self.budget.warmup_share} of {self.budget.queries} queries leaves a stage none:"
                " raise budget.queries"
            )
        for name, settings in self.trainings.items():
            method: Any = settings.method
            if method.compares and method.annotated == "stored" and not self.sampling.distributions:
                raise ValueError(
                    f"{name}.method.annotated stored needs the teacher's distributions: set sampling.distributions "
                    "({type: top} will do), or annotated live"
                )
            if method.asks_teacher and self.resources.placement.teacher == "served":
                self._can_be_served(name, settings)
        self._kept()
        self._asked_beside()
        rest = self.selected_prompts
        if self.signals.candidates is not None and self.signals.candidates < rest:
            raise ValueError(
                f"signals.candidates {self.signals.candidates} are fewer than the {rest} queries after the warm-up:"
                " raise it, or lower budget.queries"
            )
        self._recurs()
        self._peers_fit()
        writing = [("student", "sampling.student", self.sampling.student)]
        writing += [(role, "sampling.teacher", self.sampling.teacher) for role in self.teachers]
        writing += [("mentor", "mentor.sampling", self.mentor.sampling)] if self.mentor else []
        for role, field, sampling in writing:
            model = self.served[role]
            if isinstance(model.source, OpenAIModel):
                continue
            if self.prompts.max_prompt_tokens + sampling.max_tokens > model.engine.max_model_len:
                raise ValueError(
                    f"{model.engine_field}.max_model_len {model.engine.max_model_len} is below "
                    f"prompts.max_prompt_tokens {self.prompts.max_prompt_tokens} + {field}.max_tokens "
                    f"{sampling.max_tokens}: raise it"
                )
        self._scored()
        return self

    def _can_be_served(self, name: str, settings: TrainConfig) -> None:
        """A training whose teacher engines serve asks it for blocks of no more than they read."""
        if not settings.method.in_blocks:
            raise ValueError(f"{name}.method.decoder: a teacher that is served scores blocks: set blockwise")
        most = self.served["teacher"].engine.max_model_len
        if most < settings.max_length:
            raise ValueError(
                f"engines.teacher.max_model_len {most} is below {name}.max_length {settings.max_length}, which a "
                "teacher that is served reads: raise it"
            )

    def _peers_fit(self) -> None:
        """What several teachers ask of the rest of the settings."""
        if self.peers is None:
            if self.budget.prices:
                raise ValueError("budget.prices are those of further teachers, and there are none: set price")
            return
        if self.auxiliary:
            raise ValueError("auxiliary with peers: its targets are one teacher's: leave one of both out")
        if self.sampling.distributions:
            raise ValueError(
                "sampling.distributions with peers: methods learn the first teacher's distributions, also on what the "
                "others wrote: leave it out, and set annotated live"
            )
        for name in self.budget.prices or {}:
            if name not in self.peers.names[1:]:
                raise ValueError(f"budget.prices: no further teacher is called {name!r}: name those of peers.teachers")
        known = [self.models.teacher]
        for number, peer in enumerate(self.peers.teachers):
            if peer.model in known:
                raise ValueError(f"peers.teachers.{number}.model: {peer.name!r} is a teacher already, remove one")
            known.append(peer.model)
        if self.peers.review and sum(not isinstance(source, OpenAIModel) for source in known) < 2:
            raise ValueError(
                "peers.review: endpoints review nothing, so it takes two teachers that run here: leave it out"
            )

    def _kept(self) -> None:
        """What keeping needs of prompts, models and training."""
        keep, longest = self.signals.keep, self.prompts.max_prompt_tokens
        if keep.calibrate and self.prompts.verifier == "none":
            raise ValueError("signals.keep.calibrate needs known answers, and prompts.verifier is none: remove one")
        if keep.calibrate and not self.calibration_share:
            zero = next(name for name, training in self.trainings.items() if not training.validation_share)
            raise ValueError(f"signals.keep.calibrate needs validation prompts: raise {zero}.validation_share above 0")
        if keep.agreement and self.prompts.verifier == "none":
            raise ValueError("signals.keep.agreement compares final answers, and prompts.verifier is none: remove one")
        if self.signals.select.rule == "oracle" and self.prompts.verifier == "none":
            raise ValueError(
                "signals.select.rule oracle needs known answers, and prompts.verifier is none: set signals"
            )
        if keep.agreement and longest + keep.agreement.max_tokens > self.engines.assistant.max_model_len:
            raise ValueError(
                f"engines.assistant.max_model_len {self.engines.assistant.max_model_len} is below "
                f"prompts.max_prompt_tokens {longest} + signals.keep.agreement.max_tokens {keep.agreement.max_tokens}: "
                "raise it"
            )
        method: Any = self.train.method
        if keep.stand_in and method.compares and method.annotated == "stored":
            raise ValueError(
                "signals.keep.stand_in trains on text of the student, of which no distributions of the teacher are "
                "stored: set train.method.annotated live, or leave stand_in out"
            )

    def _scored(self) -> None:
        """Who gives answers a confidence has room for the longest prompt, the longest answer, and the question."""
        asked = self.signals.confidence.tokens
        if asked is None:
            return
        theirs, own = ("sampling.teacher", self.sampling.teacher), ("sampling.student", self.sampling.student)
        mentors = [("mentor.sampling", self.mentor.sampling)] if self.mentor else []
        reads = {"assistant": [theirs, own, *mentors]}
        if self.peers and self.peers.review:
            reads |= {role: [theirs] for role in self.teachers}
        for role, writing in reads.items():
            model, (field, longest) = self.served[role], max(writing, key=lambda entry: entry[1].max_tokens)
            needed = self.prompts.max_prompt_tokens + longest.max_tokens + asked
            if not isinstance(model.source, OpenAIModel) and needed > model.engine.max_model_len:
                raise ValueError(
                    f"{model.engine_field}.max_model_len {model.engine.max_model_len} is below "
                    f"prompts.max_prompt_tokens {self.prompts.max_prompt_tokens} + {field}.max_tokens "
                    f"{longest.max_tokens} + the question of signals.confidence, {asked} at most: raise it to {needed}"
                )

    def _asked_beside(self) -> None:
        """What an auxiliary target needs of engines and training, and what else only rows are made for."""
        beside, method = self.auxiliary, self.train.method
        for_rows = {"auxiliary": beside, "mentor": self.mentor, "signals.keep.stand_in": self.signals.keep.stand_in}
        unused = [name for name, section in for_rows.items() if section]
        if unused and "on_policy_share" in type(method).model_fields and method.on_policy_share == 1:
            raise ValueError(
                f"{unused[0]}: train.method {method.type} trains on rollouts alone, so its rows would only be made "
                f"and paid for: lower train.method.on_policy_share below 1, or leave {unused[0]} out"
            )
        if not beside:
            return
        needed = self.prompts.max_prompt_tokens + beside.template_tokens + beside.max_tokens
        if not self.text_only and needed > self.engines.teacher.max_model_len:
            raise ValueError(
                f"engines.teacher.max_model_len {self.engines.teacher.max_model_len} is below "
                f"prompts.max_prompt_tokens {self.prompts.max_prompt_tokens} + auxiliary.template's "
                f"{beside.template_tokens} at most + auxiliary.max_tokens {beside.max_tokens}: raise it"
            )

    def _recurs(self) -> None:
        """What only makes sense in runs that follow each other, and what does not make sense in them."""
        if any(isinstance(source, InboxSource) for source in self.prompts.heldout_sources):
            raise ValueError(
                "prompts.heldout_sources: an inbox gives prompts to learn from: leave it out, held-out prompts are set "
                "aside of the sources"
            )
        if self.recurring is None:
            if any(isinstance(source, InboxSource) for source in self.prompts.sources):
                raise ValueError("prompts.sources: an inbox needs the section recurring: add it, {} will do")
            if isinstance(self.models.student, PromotedModel):
                raise ValueError("models.student: type promoted needs the section recurring: add it, {} will do")


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The settings of a YAML file, with ``key.path=value`` overrides (values are YAML). ValueError, or pydantic's
    ValidationError, with the field at fault."""
    data = read_document(path)
    if not isinstance(data, dict):
        raise ValueError(f"config: {path} holds {type(data).__name__}, not settings by name")
    for override in overrides or []:
        keys, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"--set: {override!r} is not key.path=value")
        set_value(data, keys.split("."), parse(value, f"--set: {override!r}"), override)
    return RunConfig.model_validate(data)


def set_value(data: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    """Set the value at a path of keys and list positions; ValueError where the path leads nowhere."""
    place: Any = data
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(place, list):
            if not key.isdigit() or int(key) >= len(place):
                raise ValueError(f"--set: {override!r}: {key!r} is no position of a list of {len(place)}")
            if last:
                place[int(key)] = value
            place = place[int(key)]
        elif isinstance(place, dict):
            if last:
                place[key] = value
            place = place.setdefault(key, {})
        else:
            raise ValueError(f"--set: {override!r}: {'.'.join(keys[:depth])!r} holds a value, not settings")

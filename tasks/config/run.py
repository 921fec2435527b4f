"""The settings of a whole run: one YAML file."""

from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from tasks.config.auxiliary import Auxiliary
from tasks.config.base import Config, absent
from tasks.config.budget import Budget
from tasks.config.consistent import check
from tasks.config.document import parse, read_document
from tasks.config.evaluate import EvaluateConfig, PromoteConfig
from tasks.config.mentor import Mentor
from tasks.config.methods import Sft
from tasks.config.models import Engines, Models, OpenAIModel
from tasks.config.peers import FIRST, Everyone, Peers
from tasks.config.placement import Placement
from tasks.config.prompts import PromptsConfig
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
    def trains_on_rollouts_alone(self) -> bool:
        """Whether stage 2 draws no annotated rows. DistiLLM's share of rollouts is no setting, and falls to 0."""
        method: Any = self.train.method
        return "on_policy_share" in type(method).model_fields and method.on_policy_share == 1

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
    def _consistent(self) -> "RunConfig":
        check(self)
        return self


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

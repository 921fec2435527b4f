"""Settings of an evaluation alone: one model, any problems."""

from typing import Any

from pydantic import Field, model_validator

from tasks.config.base import Config
from tasks.config.budget import Budget
from tasks.config.evaluate import EvaluateConfig
from tasks.config.methods import Sft
from tasks.config.models import EngineConfig, Engines, Models, ModelSource
from tasks.config.prompts import NearDuplicates, PromptsConfig, PromptSource, ReasoningGymSource, ReasoningGymTask
from tasks.config.run import NAME, Resources, RunConfig, SamplingConfig
from tasks.config.signals import MeanLogprob, Sampling, Signals
from tasks.config.trackers import Trackers
from tasks.config.train import TrainConfig


class Evaluation(Config):
    """One model measured on any problems: accuracy, and loss and ROUGE-L where references are known."""

    name: str = Field(pattern=NAME)
    """Name of the evaluation: lower-case letters, digits, hyphens."""
    model: ModelSource
    """The model to measure: a run's student folder, any other model folder, or a hub id."""
    problems: list[PromptSource] = Field(min_length=1)
    """Sources of the problems."""
    count: int = Field(default=100, ge=2)
    """Problems asked, drawn from the sources."""
    system: str | None = None
    """System prompt put before conversations that have none."""
    verifier: str = "auto"
    """How answers are checked; as ``prompts.verifier`` of a distillation."""
    max_prompt_tokens: int = Field(default=256, ge=8)
    """Longer prompts are left out, tokens."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Seeds, sampling, intervals."""
    chat_template: str | None = None
    """Jinja chat template; the tokenizer's own where absent."""
    chat_template_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the template, such as ``enable_thinking: false``."""
    engine: EngineConfig = EngineConfig()
    """How the model is served."""
    resources: Resources = Resources()
    """What the evaluation may take."""
    trackers: Trackers = Trackers()
    """Where it is followed beside Prefect."""
    seed: int = 0
    """Seed of everything that is drawn."""

    @model_validator(mode="after")
    def _fits(self) -> "Evaluation":
        if self.evaluate.reference == "teacher":
            raise ValueError("evaluate.reference teacher needs a distillation's teacher: set source")
        longest = self.max_prompt_tokens + self.evaluate.max_tokens
        if longest > self.engine.max_model_len:
            raise ValueError(
                f"engine.max_model_len {self.engine.max_model_len} is below max_prompt_tokens "
                f"{self.max_prompt_tokens} + evaluate.max_tokens {self.evaluate.max_tokens}: raise it"
            )
        return self

    def settings(self) -> RunConfig:
        """The same as settings of a run, of which only models, problems and evaluation are made: the model in every
        role, the problems held out, and a few generated ones in the place of those to learn from."""
        few = ReasoningGymSource(tasks=[ReasoningGymTask(name="chain_sum", size=64)])
        unused, written = TrainConfig(method=Sft()), Sampling(max_tokens=self.evaluate.max_tokens)
        return RunConfig(
            name=self.name,
            seed=self.seed,
            models=Models(
                teacher=self.model,
                assistant=self.model,
                student=self.model,
                chat_template=self.chat_template,
                chat_template_args=self.chat_template_args,
            ),
            prompts=PromptsConfig(
                sources=[few],
                heldout_sources=self.problems,
                heldout=self.count,
                system=self.system,
                verifier=self.verifier,
                max_prompt_tokens=self.max_prompt_tokens,
                near_duplicates=NearDuplicates(enabled=False),
            ),
            budget=Budget(queries=2, warmup_share=0.5),
            sampling=SamplingConfig(teacher=written, student=written),
            signals=Signals(confidence=MeanLogprob()),
            warmup=unused,
            train=unused,
            evaluate=self.evaluate,
            engines=Engines(teacher=self.engine, assistant=self.engine, student=self.engine),
            resources=self.resources,
            trackers=self.trackers,
        )

"""A mentor: a model between teacher and student that learns from the kept annotations, then annotates further prompts
with soft labels (as in Mentor-KD). It costs no teacher query."""

from pydantic import Field, model_validator

from tasks.config.base import Config
from tasks.config.methods import Sft
from tasks.config.models import EngineConfig, ModelSource
from tasks.config.signals import Distributions, Sampling, TopTokens
from tasks.config.train import TrainConfig


class Mentor(Config):
    """An intermediate model, fine-tuned on kept rows, whose annotations of further prompts the student learns too."""

    model: ModelSource
    """The model to fine-tune, with the student's tokenizer."""
    train: TrainConfig = TrainConfig(method=Sft(), steps=100)
    """How it is fine-tuned on what was kept of the teacher's annotations: ``sft``, ``seqkd`` or ``kd``."""
    prompts: int = Field(default=256, ge=1)
    """Candidates that the teacher was not asked about, drawn at random, which it annotates; all where they are fewer.
    Its annotations pass ``signals.keep`` as the teacher's do."""
    sampling: Sampling = Sampling()
    """How it writes."""
    distributions: Distributions = TopTokens()
    """What is kept of its distributions: the soft labels."""
    soft_share: float = Field(default=0.5, ge=0, le=1)
    """Weight of KL(mentor ‖ student) on its rows, whatever the method does on others; cross entropy has the rest."""
    engine: EngineConfig | None = None
    """How it is served; as ``engines.student`` where absent."""

    @model_validator(mode="after")
    def _learns_from_rows(self) -> "Mentor":
        if self.train.method.rollout_share:
            raise ValueError(
                f"train.method: {self.train.method.type} rolls out, a mentor learns from kept rows only: set sft, "
                "seqkd or kd"
            )
        return self

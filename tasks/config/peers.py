"""Several teachers: further ones beside ``models.teacher``, who answers what, and what they say of each other's answers
(peer review as in FAIR)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tasks.config.base import Config
from tasks.config.models import EngineConfig, TeacherSource

# The first teacher's name, and names of models that are no teachers.
FIRST = "teacher"
TAKEN = (FIRST, "assistant", "student", "mentor")


class Peer(Config):
    """A further teacher. It annotates and reviews; only ``models.teacher`` is asked in training and evaluated."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")
    """Its name in routing, stages and reports: lower-case letters, digits, hyphens."""
    model: TeacherSource
    """The model. Behind an endpoint, or with the student's tokenizer."""
    engine: EngineConfig | None = None
    """How it is served; as ``engines.teacher`` where absent."""


class Everyone(Config):
    """Every teacher answers every prompt: each answer is a query, so fewer prompts are asked."""

    type: Literal["everyone"] = "everyone"


class ByWeight(Config):
    """Each prompt goes to one teacher, drawn by weight."""

    type: Literal["by_weight"] = "by_weight"
    shares: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Weight by teacher's name (``teacher`` is the first); 1 where a teacher is not named."""


class BySource(Config):
    """Each prompt goes to the teacher of its source."""

    type: Literal["by_source"] = "by_source"
    specialists: dict[str, str] = Field(min_length=1)
    """Teacher's name by source (of reasoning-gym: the task's name); other sources go to ``teacher``, the first."""


Routing = Annotated[Everyone | ByWeight | BySource, Field(discriminator="type")]


class Review(Config):
    """Each teacher scores the others' answers, as ``signals.confidence`` says."""

    threshold: float = Field(default=0.5, ge=0, le=1)
    """An annotation is kept where the mean score of the other teachers reaches this."""


class Peers(Config):
    """Several teachers. All are charged to one budget."""

    teachers: list[Peer] = Field(min_length=1, max_length=16)
    """Teachers beside ``models.teacher``."""
    routing: Routing = Everyone()
    """Who answers which prompt."""
    review: Review | None = None
    """Drop what the other teachers doubt; absent: nobody reviews. Endpoints are asked for annotations only, and review
    nothing."""

    @property
    def names(self) -> list[str]:
        """All teachers, the first one included."""
        return [FIRST, *(peer.name for peer in self.teachers)]

    def parts(self) -> list[float]:
        """Cumulative shares of the teachers in what is asked, up to 1 each where they are not known beforehand."""
        names, routing = self.names, self.routing
        if isinstance(routing, BySource):
            return [1.0] * len(names)
        weights = [routing.shares.get(name, 1.0) if isinstance(routing, ByWeight) else 1.0 for name in names]
        return [sum(weights[: number + 1]) / sum(weights) for number in range(len(names))]

    @model_validator(mode="after")
    def _names_fit(self) -> "Peers":
        names = self.names
        for name in names[1:]:
            if name in TAKEN:
                raise ValueError(f"teachers: the name {name!r} is taken, choose another")
            if names.count(name) > 1:
                raise ValueError(f"teachers: two are called {name!r}, rename one")
        routing = self.routing
        named = list(routing.shares) if isinstance(routing, ByWeight) else []
        named += list(routing.specialists.values()) if isinstance(routing, BySource) else []
        for name in named:
            if name not in names:
                raise ValueError(f"routing: no teacher is called {name!r}; they are {', '.join(names)}")
        if isinstance(routing, ByWeight) and not sum(routing.shares.get(name, 1.0) for name in names):
            raise ValueError("routing.shares: all are 0, raise one")
        return self

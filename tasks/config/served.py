"""Every model of a run by its role, and how it is served."""

from typing import TYPE_CHECKING, NamedTuple

from tasks.config.models import EngineConfig, OpenAIModel, StudentSource
from tasks.config.signals import Distributions

if TYPE_CHECKING:
    from tasks.config.run import RunConfig


class Served(NamedTuple):
    """One model. ``field`` and ``engine_field``: where its settings stand; ``kept``: what is asked of its
    distributions."""

    source: StudentSource | OpenAIModel
    engine: EngineConfig
    field: str
    engine_field: str
    kept: Distributions | None = None


def served(config: "RunConfig") -> dict[str, Served]:
    """By role: teacher, assistant, student, then further teachers by their names, and the mentor."""
    models, engines = config.models, config.engines
    found = {
        role: Served(getattr(models, role), getattr(engines, role), f"models.{role}", f"engines.{role}")
        for role in ("teacher", "assistant", "student")
    }
    found["teacher"] = found["teacher"]._replace(kept=config.sampling.distributions)
    for number, peer in enumerate(config.peers.teachers if config.peers else []):
        place = f"peers.teachers.{number}"
        engine_field = f"{place}.engine" if peer.engine else "engines.teacher"
        found[peer.name] = Served(peer.model, peer.engine or engines.teacher, f"{place}.model", engine_field)
    if mentor := config.mentor:
        engine_field = "mentor.engine" if mentor.engine else "engines.student"
        engine = mentor.engine or engines.student
        found["mentor"] = Served(mentor.model, engine, "mentor.model", engine_field, mentor.distributions)
    return found

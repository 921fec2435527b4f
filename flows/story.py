"""How stages are named and chained: the same story is planned and run.

``Pipeline.stage`` turns a name, a module, settings and inputs into a spec. Since a spec's output place follows from its
settings and inputs alone, the whole chain is known before anything runs.
"""

from abc import ABC, abstractmethod
from typing import Any

from flows.commit import commit
from infra.store import Store, open_store
from tasks.config import RunConfig
from tasks.config.models import OpenAIModel
from tasks.config.run import OPERATIONAL
from tasks.config.signals import TopTokens
from tasks.ledger import caps_of
from tasks.stage import Runtime, StageSpec

# Raised when a stage's code changes what it writes: older results are then made again.
STAGE_VERSIONS = {"tasks.sample": 4, "tasks.keep": 2, "tasks.train": 2, "tasks.evaluate": 2}


class Pipeline(ABC):
    """Something that stages are given to."""

    def __init__(self, config: RunConfig, root: str, run: str, redo: dict[str, int]) -> None:
        self.config, self.run, self.redo = config, run, redo
        self.store: Store = open_store(root)

    def spec(self, name: str, module: str, settings: dict[str, Any], inputs: dict[str, str]) -> StageSpec:
        return StageSpec(
            stage=name,
            module=module,
            version=STAGE_VERSIONS.get(module, 1),
            settings=settings,
            inputs=inputs,
            redo=self.redo.get(name, 0),
            root=self.store.uri,
            runtime=runtime(self.config, self.run),
        )

    def stage(self, name: str, module: str, settings: dict[str, Any], **inputs: str) -> str:
        """The path of the stage's manifest, once ``perform`` has seen to it. Input names use ``-`` for ``_``."""
        return self.perform(
            self.spec(name, module, settings, {key.replace("_", "-"): path for key, path in inputs.items()})
        )

    @abstractmethod
    def perform(self, spec: StageSpec) -> str: ...


class Planner(Pipeline):
    """Follows the story and only notes it down."""

    def __init__(self, config: RunConfig, root: str, run: str, redo: dict[str, int]) -> None:
        super().__init__(config, root, run, redo)
        self.specs: list[StageSpec] = []

    def perform(self, spec: StageSpec) -> str:
        self.specs.append(spec)
        return spec.manifest_path


def on_gpu(config: RunConfig) -> bool:
    """Whether models run on GPUs: as set; else by this machine, or yes on a cluster whose training asks for them."""
    if config.device != "auto":
        return config.device == "gpu"
    if config.resources.ray_address:
        return config.resources.gpus_per_worker > 0
    from pathlib import Path

    return Path("/dev/nvidia0").exists()


def runtime(config: RunConfig, run: str) -> Runtime:
    """Where stages run and how models are served."""
    gpu, price, models = on_gpu(config), config.budget.price, config.served
    room = config.resources.engine_room

    def engine(role: str) -> dict[str, Any]:
        if isinstance(source := models[role].source, OpenAIModel):
            plain = source.model_dump(mode="json", exclude={"type", "service"})
            return {"endpoint": {**plain, **source.service.model_dump(mode="json")}}
        own = models[role].engine.model_dump(mode="json")
        # A TA that is the teacher is served by its engines: their settings have to be equal.
        kept = [
            model.kept.limit
            for model in models.values()
            if model.source == source and isinstance(model.kept, TopTokens)
        ]
        most = {"max_logprobs": max(kept)} if kept else {}
        # Every request has a seed of its own; an engine that runs share can have none of theirs.
        return {**own, **most, "gpu": gpu, "seed": 0 if room else config.seed}

    return Runtime(
        run=run,
        namespace=f"switchyard-{room or run}",
        engines={role: engine(role) for role in models},
        workers=config.resources.train_workers,
        min_workers=config.resources.min_train_workers,
        gpus_per_worker=config.resources.gpus_per_worker if gpu else 0,
        placement=config.resources.placement,
        release_engines=config.resources.release_engines,
        commit=commit(),
        operational=config.model_dump(mode="json", include=OPERATIONAL),
        spending={
            "caps": {
                **caps_of(config.budget).model_dump(mode="json"),
                "price": price and price.model_dump(mode="json"),
            },
            "factor": config.budget.spending_factor,
            "prices": {name: own.model_dump(mode="json") for name, own in (config.budget.prices or {}).items()},
        },
    )

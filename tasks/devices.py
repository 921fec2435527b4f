"""How many devices a stage works on: what its seconds are multiplied by to get device-hours."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.stage import StageSpec

# Stages whose settings name no engine, and whose engine they ask.
ASKED = {"tasks.keep": "assistant", "tasks.select": "assistant"}


def devices(spec: "StageSpec") -> int:
    """GPUs of the engines that the stage asks, or of its training workers; 1 on a machine without GPUs."""
    engines, settings = spec.runtime.engines, spec.settings
    if not any(engine.get("gpu") for engine in engines.values()):
        return 1
    if spec.module == "tasks.train":
        return spec.runtime.workers * spec.runtime.gpus_per_worker
    roles = {
        ASKED.get(spec.module),
        settings.get("engine"),
        *settings.get("reviewers", []),
        *(entry["engine"] for entry in settings.get("entries", [])),
    }
    served = [engines[role] for role in roles if role in engines]
    return max(
        (engine["replicas"] * engine["tensor_parallel"] for engine in served if "endpoint" not in engine), default=0
    )

"""GPUs: how many this machine has, and how many a run takes."""

import os
from pathlib import Path

from flows.story import on_gpu
from tasks.config import RunConfig
from tasks.config.models import OpenAIModel
from tasks.config.served import Served


def gpus_here() -> int:
    """GPUs of this machine that this process may use."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([name for name in chosen.split(",") if name.strip() and name.strip() != "-1"])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def engines_taken(config: RunConfig) -> list[Served]:
    """What engines serve. Roles with the same model and settings share their engines."""
    served = [model for model in config.served.values() if not isinstance(model.source, OpenAIModel)]
    return list({repr((model.source, model.engine)): model for model in served}.values())


def gpus_taken(config: RunConfig) -> tuple[int, int]:
    """GPUs that engines take, and training workers; none on CPU."""
    if not on_gpu(config):
        return 0, 0
    engines = [model.engine.replicas * model.engine.tensor_parallel for model in engines_taken(config)]
    return sum(engines), config.resources.train_workers * config.resources.gpus_per_worker


def gpus_at_once(config: RunConfig) -> int:
    """GPUs that a run has at work at once."""
    serving, training = gpus_taken(config)
    asks = any(settings.method.asks_teacher for settings in config.trainings.values())
    if training and asks and config.resources.placement.teacher == "served":
        engine = config.served["teacher"].engine
        training += engine.replicas * engine.tensor_parallel
    return max(serving, training) if config.resources.release_engines else serving + training

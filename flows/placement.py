"""Where the models of each training will lie, for the plan: by the workers' own function, from sizes on disk."""

import psutil

from flows.story import on_gpu
from tasks.config import RunConfig
from tasks.placement import GIB, Placed, place

# Of a worker's device that this process cannot look at: most GPUs that train have as much.
ASSUMED_GIB = 80.0


def worker_memory(config: RunConfig) -> tuple[float, bool]:
    """GiB of a worker, and whether that is only assumed."""
    resources = config.resources
    if (told := resources.placement.worker_memory_gib) is not None:
        return told, False
    if on_gpu(config) or resources.ray_address:
        return ASSUMED_GIB, True
    return psutil.virtual_memory().total / GIB / resources.train_workers, False


def placements(config: RunConfig, sizes: dict[str, float]) -> dict[str, Placed]:
    """By training, with the parameters of each role's model."""
    memory, resources = worker_memory(config)[0] * GIB, config.resources
    return {
        name: place(
            resources.placement,
            settings,
            student=sizes["mentor" if name.startswith("mentor") else "student"],
            teacher=sizes["teacher"],
            workers=resources.train_workers,
            memory=memory,
            gpu=on_gpu(config),
        )
        for name, settings in config.trainings.items()
    }


def placement_notes(config: RunConfig, sizes: dict[str, float], placed: dict[str, Placed]) -> list[str]:
    """A line a training that has a choice, or too little memory: what is chosen and why."""
    found, workers = [], config.resources.train_workers
    memory, assumed = worker_memory(config)
    room = config.resources.placement.model_share * memory
    for name, chosen in placed.items():
        asks = config.trainings[name].method.asks_teacher
        if chosen.fits and workers == 1 and not on_gpu(config):
            continue
        if not sizes["student"] or (asks and not sizes["teacher"]):
            found.append(f"{name}: models lie where workers have the memory; their sizes are not known here")
            continue
        said = [f"student {'sharded' if chosen.student_sharded else 'replicated'}", f"teacher {chosen.teacher}"]
        said = said[: 1 + asks]
        line = (
            f"{name}: {' and '.join(said)} on {workers} worker{'s' * (workers > 1)}: "
            f"{chosen.bytes / GIB:.2g} GiB each, models may take {room:.2g} of {memory:.3g}"
            f"{' (assumed: set resources.placement.worker_memory_gib)' * assumed}"
        )
        if not chosen.fits:
            line += ", which is too little: raise resources.train_workers, or set train.lora"
            if asks and chosen.teacher != "served":
                line += (
                    "; or let engines serve the teacher, resources.placement.teacher served; or train without it in "
                    f"memory, from distributions stored with its answers: {name}.method {{type: kd, annotated: stored}}"
                    " and sampling.distributions {type: top}"
                )
        found.append(line)
    return found

"""Where the models of a training lie: student and teacher, each whole on every worker or in shards. Imports no torch:
the plan of a run and the workers decide by the same function."""

from dataclasses import dataclass

from tasks.config.placement import Placement
from tasks.config.train import TrainConfig

GIB = 1 << 30
# Of a parameter that learns: weight, gradient and AdamW's two moments, all float32.
LEARNING_BYTES, FROZEN_BYTES = 16, 4


@dataclass(frozen=True)
class Placed:
    """What was chosen, the bytes that models take on each worker, and whether they are within the share."""

    student_sharded: bool
    teacher_sharded: bool
    bytes: float
    fits: bool


def place(
    settings: Placement,
    train: TrainConfig,
    *,
    student: float,
    teacher: float,
    workers: int,
    memory: float,
    gpu: bool,
) -> Placed:
    """The first of these that fits, else the last: all whole, the student sharded, the teacher, both.

    ``student`` and ``teacher`` are numbers of parameters, ``memory`` a worker's in bytes. On CPU the student is never
    sharded; a teacher that training does not ask takes nothing.
    """
    width = 2 if gpu and train.precision != "float32" else 4
    learning = student * (FROZEN_BYTES if train.lora else LEARNING_BYTES)
    # FSDP gathers the student for rollouts, in the type it computes in.
    gathered = student * width if gpu and train.method.rollout_share else 0.0
    asked = teacher * width if train.method.asks_teacher else 0.0
    choices = [settings.teacher == "sharded"]
    if settings.teacher == "auto" and workers > 1:
        choices = [False, True]
    placed = None
    for teacher_sharded in choices if asked else [False]:
        for student_sharded in (False, True) if gpu else (False,):
            taken = learning / (workers if student_sharded else 1) + gathered
            taken += asked / (workers if teacher_sharded else 1)
            placed = Placed(student_sharded, teacher_sharded, taken, taken <= settings.model_share * memory)
            if placed.fits:
                return placed
    assert placed
    return placed

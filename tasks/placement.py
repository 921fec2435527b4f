"""Where the models of a training lie: student and teacher, each whole on every worker or in shards. Imports no torch:
the plan of a run and the workers decide by the same function."""

from dataclasses import dataclass
from typing import Literal

from tasks.config.placement import Placement
from tasks.config.train import TrainConfig

GIB = 1 << 30
Place = Literal["whole", "sharded", "served"]
# Of a parameter that learns: weight, gradient and AdamW's two moments, all float32.
LEARNING_BYTES, FROZEN_BYTES = 16, 4


@dataclass(frozen=True)
class Placed:
    """What was chosen, the bytes that models take on each worker, and whether they are within the share."""

    student_sharded: bool
    teacher: Place
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
    engines: bool = True,
) -> Placed:
    """The first of these that fits: all whole, the student sharded, the teacher, both; the teacher served. Where none
    does, the last that starts no engines.

    ``student`` and ``teacher`` are numbers of parameters, ``memory`` a worker's in bytes. On CPU the student is never
    sharded; a teacher that training does not ask takes nothing, and of a served one the projection is left out. It is
    served where ``engines`` can be had and the decoder is the one in blocks.
    """
    width = 2 if gpu and train.precision != "float32" else 4
    learning = student * (FROZEN_BYTES if train.lora else LEARNING_BYTES)
    # FSDP gathers the student for rollouts, in the type it computes in.
    gathered = student * width if gpu and train.method.rollout_share else 0.0
    asked = teacher * width if train.method.asks_teacher else 0.0
    choices: list[Place] = ["whole"]
    if asked and settings.teacher != "auto":
        choices = [settings.teacher]
    elif asked:
        if workers > 1:
            choices.append("sharded")
        if engines and train.method.in_blocks:
            choices.append("served")
    shares: dict[Place, float] = {"whole": 1.0, "sharded": 1 / workers, "served": 0.0}
    found = []
    for choice in choices:
        for sharded in (False, True) if gpu else (False,):
            taken = learning / (workers if sharded else 1) + gathered + asked * shares[choice]
            found.append(Placed(sharded, choice, taken, taken <= settings.model_share * memory))
    last = next((placed for placed in reversed(found) if placed.teacher != "served"), found[-1])
    return next((placed for placed in found if placed.fits), last)

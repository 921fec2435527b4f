"""What every training worker is told: one plan, made by the stage and sent through Ray Train. Imports no torch."""

import math
from typing import Any

from pydantic import BaseModel

from infra.models import ModelRef
from tasks.config.placement import Placement
from tasks.config.train import TrainConfig
from tasks.placement import GIB, Place, place


class Service(BaseModel):
    """Where engines of the teacher can be had: the run's engine room, and what to ask it for."""

    namespace: str | None  # None: that of the process that trains
    engine: dict[str, Any]  # an EngineSpec


class Plan(BaseModel):
    root: str
    rows: list[str]  # manifests with tables ``kept`` and ``charged``
    soft_rows: list[str] = []  # manifests whose ``kept`` a mentor wrote, with its distributions
    soft_share: float = 0.0  # weight of KL(mentor ‖ student) on these
    auxiliary: list[str] = []  # the same with tables ``kept`` alone: rows that no validation is by
    student: ModelRef
    teacher: ModelRef | None  # whose distributions are learned
    loads_teacher: bool = True  # False: all of them were stored with the rows
    train: TrainConfig
    samples: dict[str, str] = {}  # by role: manifest of what its engine wrote with these very weights
    seed: int
    stage_name: str
    online_teacher_tokens: int | None = None
    threads: int = 0
    device: str = "cpu"
    sharded: bool = False  # the student, by FSDP2; without it every worker holds a replica
    fsdp: bool = False  # replicas are FSDP2's too: on GPUs it brings the precision
    teacher_place: Place = "whole"
    served: Service | None = None  # for a teacher that is served
    placement: Placement = Placement()  # what decides both of a worker's models

    @property
    def dtype(self) -> str:
        """Of the teacher, and of the finished student."""
        return "bfloat16" if self.device == "cuda" and self.train.precision != "float32" else "float32"

    def placed(self, workers: int, memory: float) -> "Plan":
        """The plan of so many workers, each with as many bytes of memory unless the settings say how many."""
        if self.placement.worker_memory_gib is not None:
            memory = self.placement.worker_memory_gib * GIB
        found = place(
            self.placement,
            self.train,
            student=self.student.parameters,
            teacher=self.teacher.parameters if self.teacher else 0,
            workers=workers,
            memory=memory,
            gpu=self.device == "cuda",
            engines=self.served is not None,
        )
        sharded = self.sharded or found.student_sharded
        return self.model_copy(update={"sharded": sharded, "teacher_place": found.teacher})

    def learning_rate(self, step: int) -> float:
        """The rate of the step that follows ``step`` steps: a linear rise, then a cosine that ends at the last one."""
        config = self.train
        if step < config.warmup_steps:
            return config.learning_rate * (step + 1) / config.warmup_steps
        part = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
        low = config.final_learning_rate_share
        return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, part))))

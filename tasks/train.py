"""Training, both stages: a student, kept rows and charged prompts in; a better student out.

    python -m tasks.train --spec SPEC.json

Ray Train runs ``tasks/loop.py`` on every worker; this process starts it, shows its progress and commits what it made.
"""

import math
from typing import Literal

from pydantic import Field

from infra.engine import EngineSpec
from infra.models import ModelRef
from tasks.config.base import Config
from tasks.config.train import TrainConfig
from tasks.connection import connected
from tasks.outcome import commit
from tasks.plan import Plan, Service
from tasks.resume import newest, storage
from tasks.stage import Stage, main
from tasks.workers import fit


class TrainSettings(Config):
    """One training stage."""

    train: TrainConfig
    """What is minimised, and how."""
    seed: int
    """Seed of data order, rollouts and dropout."""
    student: str = "student"
    """Key of the student in the models of ``student_input``."""
    student_input: str = "models"
    """Input whose manifest names the student: ``models``, or an earlier training stage."""
    teacher: str = "teacher"
    """Key of the teacher in input ``models``; not read by methods that train on text alone."""
    samples: dict[str, str] = Field(default_factory=dict)
    """Inputs with samples of the ``teacher`` and of the ``student`` this stage starts from: engines are compared with
    the training models on them."""
    rows: list[str]
    """Inputs with tables ``kept`` and ``charged``."""
    soft_rows: str | None = None
    """Input whose table ``kept`` a mentor wrote, with its distributions; none where absent."""
    soft_share: float = 0.0
    """Weight of KL(mentor ‖ student) on a mentor's rows; cross entropy has the rest."""
    mentor: str = "mentor"
    """Key of the mentor in input ``models``."""
    auxiliary: list[str] = Field(default_factory=list)
    """Inputs whose table ``kept`` has auxiliary targets: never validated by, nor rolled out from."""
    stage_name: Literal["warmup", "mentor", "train"]
    """Which stage this is: it names the noise of its rollouts."""
    online_teacher_tokens: int | None = None
    """Cap on response positions the teacher decides in rollouts; none where absent."""


def model_of(stage: Stage[TrainSettings], source: str, key: str) -> ModelRef:
    """The model that an input's manifest names."""
    models = stage.input(source).facts["models"]
    if key not in models:
        raise ValueError(f"input {source!r} names no model {key!r}; it has {', '.join(models)}")
    return ModelRef.model_validate(models[key])


def plan_of(stage: Stage[TrainSettings]) -> Plan:
    """The workers' plan, checked. ValueError where teacher and student do not fit together."""
    settings, runtime = stage.settings, stage.spec.runtime
    student, teacher = model_of(stage, settings.student_input, settings.student), None
    if settings.train.precision == "bfloat16" and not runtime.gpus_per_worker:
        raise ValueError("train.precision: bfloat16 needs GPUs; use auto, or set resources.gpus_per_worker")
    if settings.train.method.compares:
        teacher = model_of(stage, "models", settings.teacher)
        if teacher.tokenizer_hash != student.tokenizer_hash or teacher.eos_token_ids != student.eos_token_ids:
            raise ValueError(
                f"train.method: {settings.train.method.type} compares distributions, but teacher {teacher.name} and "
                f"student {student.name} differ in tokenizer or end-of-sequence tokens; use a student of the teacher's "
                "family, or method sft"
            )
    if settings.soft_rows and model_of(stage, "models", settings.mentor).tokenizer_hash != student.tokenizer_hash:
        raise ValueError(
            "mentor.model: its tokenizer is not the student's, whose rows it writes: take one of its family"
        )
    device = "cuda" if runtime.gpus_per_worker else "cpu"
    return Plan(
        root=stage.store.uri,
        rows=[stage.input(name).path for name in settings.rows],
        soft_rows=[stage.input(settings.soft_rows).path] if settings.soft_rows else [],
        soft_share=settings.soft_share,
        auxiliary=[stage.input(name).path for name in settings.auxiliary],
        student=student,
        teacher=teacher,
        loads_teacher=settings.train.method.asks_teacher,
        train=settings.train,
        samples={role: stage.input(name).path for role, name in settings.samples.items()},
        seed=settings.seed,
        stage_name=settings.stage_name,
        online_teacher_tokens=settings.online_teacher_tokens,
        threads=runtime.threads,
        device=device,
        fsdp=device == "cuda",
        placement=runtime.placement,
        served=service(stage, teacher) if teacher and settings.train.method.asks_teacher else None,
    )


def service(stage: Stage[TrainSettings], teacher: ModelRef) -> Service | None:
    """Engines that would serve the teacher to training workers: of the run's room, or of one for this stage alone."""
    runtime = stage.spec.runtime
    if not runtime.namespace and runtime.placement.teacher != "served":
        return None
    settings = runtime.engines.get(stage.settings.teacher, {})
    spec = EngineSpec(model=teacher, root=stage.spec.root, trunk=True, **settings)
    return Service(namespace=runtime.namespace, engine=spec.model_dump())


def smaller(plan: Plan, workers: int, error: MemoryError) -> Plan:
    """The plan with half the sequences at once, which changes no result. ValueError where there is one already."""
    held = min(plan.train.micro_batch, math.ceil(plan.train.batch_size / workers))
    if held == 1:
        raise ValueError(
            f"{error}: set train.gradient_checkpointing, train.lora, or a lower train.max_length"
        ) from error
    return plan.model_copy(update={"train": plan.train.model_copy(update={"micro_batch": held // 2})})


def run(stage: Stage[TrainSettings]) -> None:
    """Train, then commit tables ``steps`` and ``positions``, files ``student``, facts and the student's reference."""
    plan = plan_of(stage)
    runtime = stage.spec.runtime
    with connected(runtime):
        import ray

        from infra.engine_room import open_room
        from tasks.engines import release_engines

        room = None
        if plan.served and not runtime.namespace:
            # An own one, that ends with its handle.
            room, plan.served.namespace = open_room(), ray.get_runtime_context().namespace
        if runtime.release_engines and runtime.namespace:
            release_engines(runtime.namespace)
        try:
            fit(stage, plan)
        except MemoryError as error:
            plan = smaller(plan, runtime.workers, error)
            stage.log.warning("%s; tried again with %d", error, plan.train.micro_batch)
            stage.facts["out_of_memory"] = {"said": str(error), "micro_batch": plan.train.micro_batch}
            fit(stage, plan)
        if plan.served:
            release_engines(plan.served.namespace, EngineSpec.model_validate(plan.served.engine).key)
        del room
    system, place = storage(stage.store, f"{stage.spec.folder}/checkpoints")
    with newest(system, place) as folder:
        assert folder, "its last checkpoint was reported a moment ago"
        commit(stage, plan, folder)
    system.delete_dir(place)


if __name__ == "__main__":
    main(TrainSettings, run)

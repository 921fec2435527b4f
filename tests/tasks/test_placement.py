"""Where training's models lie: by memory, as far as the settings leave it open."""

from typing import Any

import pytest

from infra.models import ModelRef
from tasks.config.placement import Placement
from tasks.config.train import TrainConfig
from tasks.placement import GIB, Placed, place
from tasks.plan import Plan

BILLION = 1e9
KD = {"type": "kd"}


def choose(
    settings: dict[str, Any] | None = None,
    method: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    gpu: bool = True,
    **given: Any,
) -> Placed:
    """On 8 GPUs of 80 GiB, of which models may take 48: a student of 1 and a teacher of 7 billion parameters."""
    sizes = {"student": BILLION, "teacher": 7 * BILLION, "workers": 8, "memory": 80 * GIB} | given
    training = TrainConfig.model_validate({"method": method or KD, **(train or {})})
    return place(Placement.model_validate(settings or {}), training, gpu=gpu, **sizes)


@pytest.mark.parametrize(
    ("given", "student_sharded", "teacher_sharded", "fits"),
    [
        ({}, False, False, True),
        # 16 bytes a parameter that learns, 2 of one that is read: 48 and 14 GB.
        ({"student": 3 * BILLION}, True, False, True),
        ({"teacher": 32 * BILLION}, False, True, True),
        ({"student": 7 * BILLION, "teacher": 70 * BILLION}, True, True, True),
        ({"student": 70 * BILLION, "teacher": 400 * BILLION}, True, True, False),
        # Adapters alone have gradients and moments.
        ({"student": 3 * BILLION, "train": {"lora": {}}}, False, False, True),
        # A teacher that training does not ask takes nothing.
        ({"teacher": 400 * BILLION, "method": {"type": "sft"}}, False, False, True),
        ({"teacher": 400 * BILLION, "method": {"type": "kd", "annotated": "stored"}}, False, False, True),
        # Shards over one worker save nothing of a teacher.
        ({"teacher": 32 * BILLION, "workers": 1}, True, False, False),
        ({"settings": {"teacher": "sharded"}}, False, True, True),
        ({"settings": {"teacher": "whole"}, "teacher": 32 * BILLION}, True, False, False),
        ({"settings": {"model_share": 0.3}}, True, False, True),
        # On CPU a student is never sharded, and float32 is what is read.
        ({"student": 3 * BILLION, "gpu": False}, False, True, True),
        ({"student": 4 * BILLION, "gpu": False}, False, True, False),
    ],
)
def test_memory_decides(given: dict[str, Any], student_sharded: bool, teacher_sharded: bool, fits: bool) -> None:
    found = choose(**given)
    assert (found.student_sharded, found.teacher_sharded, found.fits) == (student_sharded, teacher_sharded, fits)


def test_bytes_are_those_of_one_worker() -> None:
    assert choose().bytes == 16 * BILLION + 14 * BILLION
    assert choose(student=3 * BILLION).bytes == 6 * BILLION + 14 * BILLION
    # Rollouts gather the student on every worker.
    assert choose(method={"type": "gkd"}).bytes == 18 * BILLION + 14 * BILLION
    assert choose({"teacher": "sharded"}, gpu=False).bytes == 16 * BILLION + 3.5 * BILLION


def test_a_plan_is_that_of_its_workers() -> None:
    student, teacher = (
        ModelRef(name=name, revision=name, parameters=int(parameters))
        for name, parameters in (("student", 3 * BILLION), ("teacher", 32 * BILLION))
    )
    train = TrainConfig.model_validate({"method": KD})
    plan = Plan(root="", rows=[], student=student, teacher=teacher, train=train, seed=0, stage_name="train", fsdp=True)
    plan = plan.model_copy(update={"device": "cuda"})

    def found(workers: int, gib: float, **placement: Any) -> tuple[bool, bool]:
        chosen = plan.model_copy(update={"placement": Placement.model_validate(placement)}).placed(workers, gib * GIB)
        return chosen.sharded, chosen.teacher_sharded

    assert found(8, 80) == (True, True)
    assert found(8, 1000) == (False, False)
    # What is set is not looked up.
    assert found(8, 1000, worker_memory_gib=80) == (True, True)
    assert found(1, 80) == (True, False)

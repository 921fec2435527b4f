"""Where training's models lie: by memory, as far as the settings leave it open."""

from typing import Any

import pytest

from infra.models import ModelRef
from tasks.config.placement import Placement
from tasks.config.train import TrainConfig
from tasks.placement import GIB, Placed, place
from tasks.plan import Plan, Service

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
    ("given", "student_sharded", "teacher", "fits"),
    [
        ({}, False, "whole", True),
        # 16 bytes a parameter that learns, 2 of one that is read: 48 and 14 GB.
        ({"student": 3 * BILLION}, True, "whole", True),
        ({"teacher": 32 * BILLION}, False, "sharded", True),
        ({"student": 7 * BILLION, "teacher": 70 * BILLION}, True, "sharded", True),
        # What no shard holds is served, which leaves the student's part.
        ({"teacher": 400 * BILLION}, False, "served", True),
        ({"student": 70 * BILLION, "teacher": 400 * BILLION}, True, "sharded", False),
        # Not where there is no engine, nor by a decoder that asks for single tokens.
        ({"teacher": 400 * BILLION, "engines": False}, True, "sharded", False),
        ({"teacher": 400 * BILLION, "method": {"type": "switch", "decoder": "reference"}}, True, "sharded", False),
        # Adapters alone have gradients and moments.
        ({"student": 3 * BILLION, "train": {"lora": {}}}, False, "whole", True),
        # A teacher that training does not ask takes nothing.
        ({"teacher": 400 * BILLION, "method": {"type": "sft"}}, False, "whole", True),
        ({"teacher": 400 * BILLION, "method": {"type": "kd", "annotated": "stored"}}, False, "whole", True),
        # Shards over one worker save nothing of a teacher.
        ({"teacher": 32 * BILLION, "workers": 1}, False, "served", True),
        ({"teacher": 32 * BILLION, "workers": 1, "engines": False}, True, "whole", False),
        ({"settings": {"teacher": "sharded"}}, False, "sharded", True),
        ({"settings": {"teacher": "served"}}, False, "served", True),
        # What is not asked is not served.
        ({"settings": {"teacher": "served"}, "method": {"type": "sft"}}, False, "whole", True),
        ({"settings": {"teacher": "whole"}, "teacher": 32 * BILLION}, True, "whole", False),
        ({"settings": {"model_share": 0.3}}, True, "whole", True),
        # On CPU a student is never sharded, and float32 is what is read.
        ({"student": 3 * BILLION, "gpu": False}, False, "sharded", True),
        ({"student": 4 * BILLION, "gpu": False}, False, "sharded", False),
    ],
)
def test_memory_decides(given: dict[str, Any], student_sharded: bool, teacher: str, fits: bool) -> None:
    found = choose(**given)
    assert (found.student_sharded, found.teacher, found.fits) == (student_sharded, teacher, fits)


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

    def found(workers: int, gib: float, **placement: Any) -> tuple[bool, str]:
        chosen = plan.model_copy(update={"placement": Placement.model_validate(placement)}).placed(workers, gib * GIB)
        return chosen.sharded, chosen.teacher_place

    assert found(8, 80) == (True, "sharded")
    assert found(8, 1000) == (False, "whole")
    # What is set is not looked up.
    assert found(8, 1000, worker_memory_gib=80) == (True, "sharded")
    # Engines are known to a plan that was told of them.
    assert found(1, 80) == (True, "whole")
    plan = plan.model_copy(update={"served": Service(namespace="run", engine={})})
    assert found(1, 80) == (False, "served")

"""Training on two workers is that on one: sharded or replicated, with rollouts that end at different times on each."""

from typing import Any

import pytest
import torch
from toys import commit_inputs, kept_rows, pair, stage_of
from two_workers import facts, on_two

from infra.store import LocalStore
from tasks.plan import Plan
from tasks.student import World
from tasks.train import plan_of

pytestmark = pytest.mark.timeout(180)
torch.set_num_threads(1)
SWITCH = {"type": "switch", "max_new_tokens": 10, "block": 4}
MINILLM = {"type": "minillm", "max_new_tokens": 10, "block": 4, "collected_batches": 1, "epochs": 2}
METHODS = {"sft": {"type": "sft"}, "switch": SWITCH, "minillm": MINILLM}
# How a worker holds the models: (student in shards, student by FSDP2, where the teacher lies).
LAYOUTS = {
    "sharded": (True, True, "whole"),
    "replicated": (False, True, "whole"),
    "all-sharded": (True, True, "sharded"),
}
CASES = {
    "sft-sharded": ("sft", (True, True, "whole")),
    "sft-summed": ("sft", (False, False, "whole")),
    "switch-sharded": ("switch", LAYOUTS["sharded"]),
    "switch-replicated": ("switch", LAYOUTS["replicated"]),
    "switch-teacher": ("switch", (False, False, "sharded")),
    "switch-all-sharded": ("switch", LAYOUTS["all-sharded"]),
    "minillm-all-sharded": ("minillm", LAYOUTS["all-sharded"]),
}
Facts = dict[str, Any]


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plan]:
    """By method, of one plain worker."""
    store = LocalStore(tmp_path_factory.mktemp("store"))
    inputs = commit_inputs(store, pair(store), kept_rows(48))
    # Six sequences over two workers, three at once: shares, micro-batches and rollouts are all unequal.
    train = {"steps": 3, "batch_size": 6, "micro_batch": 3, "learning_rate": 1e-2, "warmup_steps": 0}
    return {name: plan_of(stage_of(store, inputs, {**train, "method": method})) for name, method in METHODS.items()}


@pytest.fixture(scope="module")
def alone(plans: dict[str, Plan]) -> dict[str, Facts]:
    return {name: facts(plan, World(0, 1, torch.device("cpu"))) for name, plan in plans.items()}


@pytest.fixture(scope="module")
def together(plans: dict[str, Plan], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Facts]]:
    names = ("sharded", "fsdp", "teacher_place")
    cases = {
        case: plans[method].model_copy(update=dict(zip(names, layout, strict=True)))
        for case, (method, layout) in CASES.items()
    }
    return on_two(cases, tmp_path_factory.mktemp("workers"))


@pytest.mark.parametrize("case", CASES)
def test_two_workers_are_one(case: str, alone: dict[str, Facts], together: dict[str, list[Facts]]) -> None:
    method, (sharded, _, teacher) = CASES[case]
    one, both = alone[method], together[case]
    for name, weight in both[0]["weights"].items():
        assert torch.equal(weight, both[1]["weights"][name]), name
        # Adam magnifies the rounding of gradients near 0, and of no others.
        apart, clear = (weight - one["weights"][name]).abs(), one["gradients"][name].abs() > 1e-5
        assert apart.max() < 2e-3, name
        assert not (apart[clear] > 5e-6).any(), name
    for name, gradient in both[0]["gradients"].items():
        torch.testing.assert_close(gradient, one["gradients"][name], rtol=1e-4, atol=1e-8, msg=name)
    for found in both:
        assert found["positions"] == one["positions"]
        assert found["validation"] == pytest.approx(one["validation"], rel=1e-5)
        for name in ("tokens", "teacher_tokens", "rollouts", "intervention_rate", "eos_rate"):
            assert [row[name] for row in found["steps"]] == [row[name] for row in one["steps"]], name
        for name in ("loss", "gradient_norm"):
            assert [row[name] for row in found["steps"]] == pytest.approx([row[name] for row in one["steps"]], rel=1e-4)
        # Half of what is sharded.
        held, whole = found["held"], one["held"]
        assert (held["student"] < 0.6 * whole["student"]) == sharded
        if method != "sft":
            assert (held["teacher"] < 0.8 * whole["teacher"]) == (teacher == "sharded")


@pytest.mark.parametrize("case", [case for case, (method, _) in CASES.items() if method != "sft"])
def test_workers_ran_unequal_numbers_of_forwards(case: str, together: dict[str, list[Facts]]) -> None:
    first, second = (found["calls"] for found in together[case])
    # In SWITCH's first step one of both has no prompt at all; MiniLLM's collection is dealt out to both.
    assert first["student"] != second["student"]
    assert first["teacher"] + second["teacher"] > 0
    assert (min(first["student"], second["student"]) > 0) == case.startswith("minillm")

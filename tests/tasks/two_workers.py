"""Two training workers without Ray: processes that meet over gloo, each with the loop of a plan."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from tasks.checkpoint import State
from tasks.loop import Loop
from tasks.plan import Plan
from tasks.student import World, full


def facts(plan: Plan, world: World) -> dict[str, Any]:
    """A validation, then all steps: what there is to compare, and how often each model ran in rollouts."""
    loop, calls = Loop(plan, world), {"student": 0, "teacher": 0}
    models = {"student": loop.student.model, "teacher": loop.method.teacher}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    # Losses read hidden states of the model within; rollouts go through its projection.
    for name, model in models.items():
        if model is not None:
            model.register_forward_pre_hook(count(name))
    before = loop.validate()
    loop.step()
    gradients = {name: full(loop.optimizer.state[p]["exp_avg"]).clone() for name, p in loop.student.trained().items()}
    first = dict(calls)
    while loop.state.step < plan.train.steps:
        loop.step()
    state: State = loop.state
    return {
        "calls": first,
        "validation": [before, loop.validate()],
        "steps": state.steps,
        "positions": state.positions[:4],
        "gradients": gradients,
        "weights": {name: full(parameter) for name, parameter in loop.student.trained().items()},
        "held": held(loop),
    }


def held(loop: Loop) -> dict[str, int]:
    """Numbers that this worker holds of each model's parameters between steps."""
    models = {"student": loop.student.model, "teacher": loop.method.teacher}
    return {
        name: sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())
        for name, model in models.items()
        if model is not None
    }


def work(rank: int, plans: dict[str, Plan], folder: Path) -> None:
    torch.set_num_threads(1)
    # Shorter than the test's: a worker that waits for the other in vain says where.
    meeting = {"init_method": f"file://{folder}/rendezvous", "timeout": timedelta(seconds=100)}
    dist.init_process_group("gloo", rank=rank, world_size=2, **meeting)
    for name, plan in plans.items():
        torch.save(facts(plan, World(rank, 2, torch.device("cpu"))), folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


def on_two(plans: dict[str, Plan], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The facts of both workers, by plan."""
    processes.spawn(work, (plans, folder), nprocs=2)
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(2)] for name in plans}

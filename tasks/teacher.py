"""The teacher beside a student under training: frozen, and whole on every worker or with its layers sharded (FSDP2).

A forward of a sharded teacher gathers each layer from all workers, and workers ask it unequally often: rollouts end at
different lengths, and a micro-batch of rollouts needs no reading. So whoever asks says so first, and who has nothing
more to ask runs empty forwards beside the others until nobody has.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from infra.models import load_model
from tasks.student import World, check_projection, hidden_states, layers_of


class Lockstep:
    """A sharded teacher's forwards, one of all workers at a time: ``with lockstep(): …`` around what may ask it."""

    def __init__(self, teacher: Any, world: World) -> None:
        self.teacher, self.world, self.following = teacher, world, False
        teacher.base_model.register_forward_pre_hook(self._announce)

    def _announce(self, *_: Any) -> None:
        if not self.following:
            self.world.sum(torch.ones(1))

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Collective. Within, a worker asks as often as it likes; it leaves when all are done."""
        yield
        self.following = True
        with torch.no_grad():
            while self.world.sum(torch.zeros(1)).item():
                hidden_states(self.teacher, torch.zeros(1, 1, dtype=torch.int64, device=self.world.device))
        self.following = False
        # It keeps a list of forwards for a backward that never comes.
        self.teacher.base_model.reset_iter_state()


def load_teacher(folder: Path, dtype: str, world: World, *, sharded: bool) -> Any:
    """The frozen model on the worker's device. Embeddings and projection, which losses read, stay whole. Collective
    where it is sharded."""
    teacher = load_model(folder, dtype).requires_grad_(False)
    if sharded:
        mesh, layers = init_device_mesh(world.device.type, (world.size,)), layers_of(teacher)
        inside = {parameter for layer in layers for parameter in layer.parameters()}
        whole = {parameter for parameter in teacher.parameters() if parameter not in inside}
        # One layer at a time goes to the device and leaves it as a shard.
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(teacher.base_model, mesh=mesh, ignored_params=whole)
        for parameter in whole:
            parameter.data = parameter.data.to(world.device)
    else:
        teacher.to(world.device)
    check_projection(teacher, "teacher")
    return teacher

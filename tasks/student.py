"""The student under training: loaded, given adapters, sharded or replicated, its gradients summed over workers.

Its loss is taken inside ``forward``: the base model's hidden states go straight into a fused kernel, and FSDP has the
projection gathered at that moment. Weights are float32; on GPUs FSDP2 computes in bfloat16.

Shape legend: B sequences, L padded length, N response positions, H width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from infra.models import load_model
from tasks.batches import Batch, collate
from tasks.config.train import Lora, TrainConfig


@dataclass(frozen=True)
class World:
    """This worker among all: rank, number of workers, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    def sum(self, values: Tensor) -> Tensor:
        """The sum over workers of a CPU tensor. Collective."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def max(self, value: float) -> float:
        """The largest of the workers' values. Collective."""
        highest = torch.tensor(value, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        return highest.item()


@dataclass(frozen=True)
class Head:
    """A model's output projection: logits = softcap · tanh((hidden · weightᵀ + bias) / softcap)."""

    weight_VH: Tensor
    bias_V: Tensor | None
    softcap: float | None

    def first(self, vocabulary: int) -> "Head":
        """The projection onto the first ids only."""
        if vocabulary == len(self.weight_VH):
            return self
        bias_V = None if self.bias_V is None else self.bias_V[:vocabulary]
        return Head(self.weight_VH[:vocabulary], bias_V, self.softcap)


# A fused kernel's result: the weighted sum of the losses, and the loss of each position without gradient.
Loss = tuple[Tensor, Tensor]
Objective = Callable[[Tensor, Head, Batch], tuple[Tensor, ...]]


def head_of(model: Any) -> Head:
    projection = model.get_output_embeddings()
    return Head(projection.weight, projection.bias, getattr(model.config, "final_logit_softcapping", None))


def hidden_states(model: Any, ids_BL: Tensor) -> Tensor:
    """What the projection sees [B, L, H]."""
    return model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state


def layers_of(model: Any) -> list[nn.Module]:
    """The layers that shards are made of, outermost parts left out: embeddings, the last norm, the projection."""
    kinds = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in kinds]


@torch.no_grad()
def check_projection(model: Any, role: str) -> None:
    """ValueError where logits are more than a projection of the hidden states (a scale, say): losses would be wrong."""
    if type(model.get_output_embeddings()) is not nn.Linear:
        raise ValueError(f"{role}: its output projection is not a plain linear layer; leave it out of lora.targets")
    ids_BL, head = torch.arange(8, device=model.device)[None], head_of(model)
    logits_BLV = hidden_states(model, ids_BL) @ head.weight_VH.T
    if head.bias_V is not None:
        logits_BLV = logits_BLV + head.bias_V
    if head.softcap is not None:
        logits_BLV = head.softcap * (logits_BLV / head.softcap).tanh()
    expected_BLV = model(input_ids=ids_BL, use_cache=False).logits
    worst = (logits_BLV - expected_BLV).abs().max().item()
    if worst > 0.02 * expected_BLV.abs().max().item():
        raise ValueError(
            f"{role}: {type(model).__name__} makes its logits in a way that training does not know (they differ by "
            f"{worst:.3g}); use another architecture"
        )


def adapt(model: Any, lora: Lora, seed: int) -> Any:
    """The model with low-rank adapters in place and everything else frozen; returns peft's wrapper."""
    from peft import LoraConfig, get_peft_model

    # The adapters' first matrices are random: the same on every worker.
    torch.manual_seed(seed)
    adapters = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        bias="none",
    )
    return get_peft_model(model, adapters)


class Student(nn.Module):
    """A causal language model that is trained: sharded over all workers, or a replica on each.

    With ``fsdp`` replicas are FSDP2's too, in shards of one worker: they compute in the same precision.
    """

    def __init__(
        self, folder: Path, config: TrainConfig, world: World, *, seed: int, sharded: bool, fsdp: bool = False
    ) -> None:
        super().__init__()
        self.world, self.fsdp = world, fsdp or sharded
        self.model: Any = load_model(folder, "float32").to(world.device)
        if config.lora:
            adapt(self.model, config.lora, seed)
        check_projection(self.model, "student")
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.fsdp:
            replicas = 1 if sharded else self.world.size
            shape = (replicas, self.world.size // replicas)
            mesh = init_device_mesh(self.world.device.type, shape, mesh_dim_names=("replicas", "shards"))
            self._wrap(mesh["shards"] if sharded else mesh, config.precision)

    def _wrap(self, mesh: DeviceMesh, precision: str) -> None:
        narrow = self.world.device.type == "cuda" and precision != "float32"
        # Inputs stay as they are: the positions' weights need more than eight bits.
        policy = MixedPrecisionPolicy(torch.bfloat16 if narrow else None, torch.float32, cast_forward_inputs=False)
        for module in layers_of(self.model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        fully_shard(self, mesh=mesh, mp_policy=policy)
        # The first module that runs becomes FSDP's root; a rollout would make it a layer.
        with torch.no_grad():
            self(collate([], self.world.device), lambda hidden_NH, head, batch: (hidden_NH.sum(), hidden_NH))
        self.release()

    def forward(self, batch: Batch, objective: Objective) -> tuple[Tensor, ...]:
        hidden_BLH = hidden_states(self.model, batch.ids_BL)
        return objective(hidden_BLH.flatten(0, 1)[batch.where_N], head_of(self.model), batch)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this worker's share of the global loss."""
        # FSDP averages over workers; the loss is a sum over them.
        (loss * self.world.size if self.fsdp else loss).backward()

    def sum_gradients(self) -> None:
        """Sum what FSDP, where it is used, has summed already. Collective."""
        if self.world.size > 1 and not self.fsdp:
            pending = [dist.all_reduce(p.grad, async_op=True) for p in self.trained().values()]
            for work in pending:
                work.wait()

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by the model's names for them; tied ones once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _fsdp_modules(self) -> list[FSDPModule]:
        return [module for module in self.modules() if isinstance(module, FSDPModule)]

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """The model with all parameters on every worker: within, workers may run unequal numbers of forwards."""
        modules = self._fsdp_modules()
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield self.model
        finally:
            self.release()
            for module in modules:
                # The root keeps its parameters between forward and backward, which follow each other.
                module.set_reshard_after_forward(module is not self, recurse=False)

    # Not `reshard`: FSDP's method of that name would come before it.
    def release(self) -> None:
        """Free what forwards without a backward gathered, and forget them: FSDP gathers for a backward by the order of
        all forwards since the last one, so workers with unequal rollouts would wait for each other forever."""
        if isinstance(self, FSDPModule):
            self.reset_iter_state()


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU. Collective where it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


@torch.no_grad()
def fill(target: Tensor, source: Tensor) -> None:
    """Write a whole tensor into one that may be sharded. Every worker holds the same source."""
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(source)


def export(
    folder: Path, weights: dict[str, Tensor], lora: Lora | None, dtype: str, target: Path, chat_template: str | None
) -> None:
    """A plain Hugging Face folder: the model of ``folder`` with these weights, adapters merged, and its tokenizer, with
    another chat template where one is given."""
    from infra.models import load_tokenizer

    model = load_model(folder, "float32")
    adapted = adapt(model, lora, 0) if lora else None
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        fill(parameters[name], weight)
    if adapted is not None:
        model = adapted.merge_and_unload()
    model.to(getattr(torch, dtype)).save_pretrained(target)
    load_tokenizer(folder, chat_template).save_pretrained(target)

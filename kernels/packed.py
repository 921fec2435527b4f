"""A model's linear layers on a CPU, multiplied by oneDNN from weights in its own layout while the model decodes.

A decoding step feeds a few tokens, so its time is that of reading the weights, and a BLAS reads a row-major matrix of
49,152 rows several times slower than oneDNN reads its blocks (docs/log.md). The numbers are the same to rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

_SMALLEST = 1 << 16  # weights; below it a call costs more than the multiplication
_ROWS = 16  # how many tokens the layout is chosen for; it serves any number


def packable(module: nn.Module) -> bool:
    """Whether oneDNN can take this layer's work: a plain float32 matrix on a CPU."""
    if type(module) is not nn.Linear or not torch.backends.mkldnn.is_available():
        return False
    weight = module.weight
    plain = type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and weight.numel() >= _SMALLEST


@contextmanager
def packed(*models: nn.Module) -> Iterator[None]:
    """Within, the models decode from packed weights, which must not change; there are no gradients.

    A frozen model's packed weights stay with it (as much memory again) and are used the next time; those of a model
    that trains are packed anew. Where nothing can be packed (a GPU, another dtype, a sharded model), nothing changes.
    """
    layers = [module for model in set(models) for module in model.modules() if packable(module)]
    try:
        for layer in layers:
            layer.forward = partial(_linear, _packed(layer), layer.bias)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
            if layer.weight.requires_grad:
                layer.__dict__.pop("_packed", None)


def _packed(layer: nn.Linear) -> Tensor:
    """The layer's weights in oneDNN's layout; kept until they change."""
    known = layer.__dict__.get("_packed")
    state = (layer.weight.data_ptr(), layer.weight._version)
    if known is None or known[0] != state:
        known = state, torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)
        # Not a buffer: it is no part of the model that is saved or moved.
        layer.__dict__["_packed"] = known
    weight: Tensor = known[1]
    return weight


@torch.no_grad()
def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product

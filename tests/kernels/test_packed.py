"""Packed linear layers: the same numbers to rounding, of the weights as they are now, and nothing left behind."""

import copy
import io

import pytest
import torch
from torch import nn

from kernels.packed import packable, packed


class Net(nn.Module):
    """Two layers large enough to pack, one that is not, with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.small = nn.Linear(300, 260), nn.Linear(260, 500, bias=False), nn.Linear(500, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.small(self.second(self.first(x).relu()))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("shape", [(1, 300), (8, 300), (3, 5, 300), (2, 70, 300)])
def test_the_numbers_are_the_same(net: Net, shape: tuple[int, ...]) -> None:
    assert packable(net.first)
    assert not packable(net.small)
    x = torch.randn(shape)
    want = net(x)
    with packed(net):
        assert "forward" in net.first.__dict__
        torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-5)
    assert "forward" not in net.first.__dict__


def test_a_strided_input(net: Net) -> None:
    x = torch.randn(300, 9).T
    with packed(net):
        torch.testing.assert_close(net(x), net(x.contiguous()))


def test_weights_are_those_of_now(net: Net) -> None:
    x = torch.randn(4, 300)
    with packed(net):
        before = net(x)
    with torch.no_grad():
        net.second.weight.mul_(2)
    with packed(net):
        torch.testing.assert_close(net(x) - net.small.bias, 2 * (before - net.small.bias), rtol=1e-4, atol=1e-5)


def test_only_a_frozen_model_keeps_its_packed_weights(net: Net) -> None:
    frozen = copy.deepcopy(net).requires_grad_(False)
    with packed(net, frozen):
        pass
    assert "_packed" not in net.first.__dict__
    kept = frozen.first.__dict__["_packed"][1]
    with packed(frozen):
        assert frozen.first.__dict__["_packed"][1] is kept
    frozen.first.weight.add_(1)
    with packed(frozen):
        assert frozen.first.__dict__["_packed"][1] is not kept
    buffer = io.BytesIO()
    torch.save(frozen.state_dict(), buffer)
    assert set(frozen.state_dict()) == set(net.state_dict())


def test_an_error_leaves_no_packed_layer(net: Net) -> None:
    with pytest.raises(RuntimeError), packed(net):
        raise RuntimeError
    assert "forward" not in net.second.__dict__
    loss = net(torch.randn(2, 300)).sum()
    loss.backward()
    assert net.second.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay_as_they_are(net: Net, dtype: torch.dtype) -> None:
    assert not packable(net.to(dtype).first)

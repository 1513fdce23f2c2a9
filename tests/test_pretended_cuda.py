"""The CUDA device that CPU tensors pass for: it finds what a real one would refuse."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.pretended_cuda import CUDA, PretendedCUDA

HERE = torch.ones(3, 4)
MIXED = {
    "add": lambda x: x + HERE,
    "cat": lambda x: torch.cat([x, HERE]),
    "layer": lambda x: nn.Linear(4, 2)(x),
    "index by the device": lambda x: HERE[x[0].long()],
    "masked fill": lambda x: x.masked_fill(HERE > 0, 0.0),
    "number times what is here": lambda x: x.sum() * HERE,
}


@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_two_devices_are_refused(name):
    with PretendedCUDA(), pytest.raises(RuntimeError, match="same device"):
        MIXED[name](torch.ones(3, 4, device="cuda"))


def test_numpy_and_float64_are_refused():
    with PretendedCUDA():
        x = torch.ones(3, device="cuda")
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        with pytest.raises(TypeError, match="float64"):
            x.double()
        assert x.cpu().double().numpy().sum() == 3


def test_results_are_where_their_operands_are():
    with PretendedCUDA():
        x = HERE.to("cuda")
        layer = nn.Linear(4, 2).to(CUDA)
        layer(x).sum().backward()
        there = [x, x[0], x.clone(), x * 2, x + torch.tensor(1.0), x[torch.tensor([0])], x.new_zeros(2)]
        there += [
            x.new_tensor([1.0]),
            torch.zeros_like(x),
            F.one_hot(x.long()),
            HERE.to(x),
            x.to(torch.int64),
        ]
        there += [torch.empty(0).to(x.device), layer.weight, layer.weight.grad, torch.arange(3, device=CUDA)]
        assert {tensor.device for tensor in there} == {CUDA}
        here = [
            HERE,
            x.cpu(),
            x.to("cpu"),
            x.to(HERE),
            torch.zeros_like(x, device="cpu"),
            HERE[torch.tensor(0)],
        ]
        here += [torch.zeros(3), HERE.new_zeros(2), HERE.clone().copy_(x), nn.Linear(4, 2).weight]
        assert {tensor.device.type for tensor in here} == {"cpu"}
        assert x.is_cuda
        assert not HERE.is_cuda
    assert HERE.device.type == "cpu"

"""Moments in 8 bits by torchao, run without compiling so that seconds do."""

import sys

import pytest
import torch
from torch import nn

from dalle.schedules import Schedule
from dalle.train.checkpoint import restore
from dalle.train.config import EMAConfig, OptimizerConfig
from dalle.train.optimizer import build_optimizers
from dalle.train.state import EMA, TrainState
from dalle.train.step import train_step
from dalle.types import Loss
from tests.helpers.checkpoints import save_checkpoint

SETTINGS = {"lr": Schedule(1e-2, 1e-2), "warmup_steps": 0, "max_variance": None}
IN_8BIT = OptimizerConfig(**SETTINGS, state_dtype="8bit")
IN_FP32 = OptimizerConfig(**SETTINGS)


def test_a_missing_torchao_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ImportError, match=r"zeroshot-text2image\[lowbit\]"):
        build_optimizers(nn.Linear(64, 64), IN_8BIT)


class Net(nn.Module):
    """A matrix of 4,096 values, one of fewer, an embedding and biases."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 64)
        self.large, self.small = nn.Linear(64, 64), nn.Linear(64, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.small(torch.relu(self.large(self.embedding(ids))))


def objective(model: nn.Module, batch: torch.Tensor, step: int) -> Loss:
    return Loss((model(batch)[:, 0] - batch / 64).square().mean())


def fresh(optim: OptimizerConfig = IN_8BIT) -> TrainState:
    torch.manual_seed(0)
    model = Net()
    return TrainState(model, build_optimizers(model, optim), EMA(model, EMAConfig()))


def train(state: TrainState, steps: int, optim: OptimizerConfig = IN_8BIT) -> list[float]:
    batches = [torch.arange(64)[(7 * (state.step + i)) % 32 :] for i in range(steps)]
    return [
        float(train_step(state, batch, objective, optim, "fp32", 0)[0].total.detach()) for batch in batches
    ]


def weights(state: TrainState) -> list[torch.Tensor]:
    return [p.detach().clone() for p in state.model.parameters()]


@pytest.mark.slow  # importing torchao takes longer than the tests
class TestIn8Bit:
    @pytest.fixture(autouse=True)
    def _eager(self):
        pytest.importorskip("torchao.optim", reason="needs torchao, the extra lowbit")
        with torch.compiler.set_stance("force_eager"):
            yield

    def test_large_matrices_have_8_bits_and_the_rest_fp32(self):
        state = fresh()
        train(state, 1)
        kept = {name: tensor.dtype for name, tensor in state.state_dict()[0]["optimizer"].items()}
        assert kept["large.weight/exp_avg.codes"] == kept["large.weight/exp_avg_sq.codes"] == torch.uint8
        for name in ("embedding.weight", "large.bias", "small.weight", "small.bias"):
            assert kept[f"{name}/exp_avg"] == kept[f"{name}/exp_avg_sq"] == torch.float32

    def test_it_learns_as_fp32_does(self):
        low, full = (train(fresh(optim), 60, optim) for optim in (IN_8BIT, IN_FP32))
        assert low[0] == full[0]
        assert low[-1] < 0.05 * low[0]
        assert low != full

    def test_the_learning_rate_follows_the_schedule(self):
        optim = OptimizerConfig(**SETTINGS | {"lr": Schedule(1.0, 0.0, 4, "linear")}, state_dtype="8bit")
        state = fresh(optim)
        for rate in (1.0, 0.75, 0.5):
            train(state, 1, optim)
            assert [float(group["lr"]) for o in state.optimizers for group in o.param_groups] == [rate] * 2

    def test_resuming_is_exact(self, tmp_path):
        whole = fresh()
        train(whole, 6)
        first = fresh()
        train(first, 3)
        folder = save_checkpoint(tmp_path, first, {"kind": "net"})
        second = fresh()
        restore(folder, second)
        train(second, 3)
        assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))
        one, other = whole.state_dict()[0]["optimizer"], second.state_dict()[0]["optimizer"]
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_moments_of_fp32_are_rounded_and_the_other_way_is_refused(self, tmp_path):
        fp32, low = fresh(IN_FP32), fresh()
        train(fp32, 3, IN_FP32)
        low.load(*fp32.state_dict(), tmp_path)
        expected = fp32.optimizers[0].state[fp32.model.large.weight]["exp_avg"]
        kept = low.optimizers[0].state[low.model.large.weight]["exp_avg"]
        torch.testing.assert_close(kept.dequantize(), expected, rtol=0, atol=float(expected.abs().max()) / 50)
        train(low, 1)
        with pytest.raises(ValueError, match=r"set optimizer\.state_dtype to 8bit"):
            fresh(IN_FP32).load(*low.state_dict(), tmp_path)

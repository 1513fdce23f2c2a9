"""Averaged weights (appendices A.2, B.2) and the correction of their start at zero."""

from contextlib import suppress

import pytest
import torch
from torch import nn

from dalle.planner.count import LiveBytes
from dalle.train.config import EMAConfig
from dalle.train.state import EMA


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def set_weights(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)


RAMP = [step / 100 for step in range(1, 101)]


@pytest.mark.parametrize(
    ("decay", "every", "values", "average"),
    [
        (0.999, 1, [3.0], 3),  # from the first update on
        (0.999, 1, [3.0] * 5, 3),
        (0.99, 25, RAMP, 0.62814),  # near the mean of four values: without the correction it would be near 0
        (0.9, 1, [1.0, 5.0, -2.0, 4.0], (0.729 + 5 * 0.81 - 2 * 0.9 + 4) / (0.729 + 0.81 + 0.9 + 1)),
        (0.5, 3, [9.0, 9.0, 1.0, 9.0, 9.0], 1),
    ],
)
def test_the_average_of_weights_after_each_update(decay, every, values, average, model):
    ema = EMA(model, EMAConfig(decay, every))
    for step, value in enumerate(values, start=1):
        set_weights(model, value)
        ema.update(model, step)
    assert float(ema.averaged()["bias"][0]) == pytest.approx(average, rel=1e-4)


def test_applied_holds_the_average_inside_and_restores_the_weights(model):
    """Before the first averaging there is none, and the weights stand."""
    ema = EMA(model, EMAConfig(decay=0.5, update_every=2))
    set_weights(model, 1.0)
    ema.update(model, 1)
    with ema.applied(model):
        assert ema.averaged() == {}
        assert model.weight[0, 0].item() == 1.0
    ema.update(model, 2)
    before = ema.averaged()["weight"].clone()
    set_weights(model, 7.0)

    with suppress(RuntimeError), ema.applied(model):
        assert model.weight[0, 0].item() == pytest.approx(1.0)
        set_weights(model, 3.0)
        raise RuntimeError("inside")
    assert model.weight[0, 0].item() == 7.0
    assert torch.equal(ema.averaged()["weight"], before)


def test_an_average_kept_on_the_cpu_is_the_same_average(model):
    here, there = (EMA(model, EMAConfig(0.9, 1, device)) for device in ("same", "cpu"))
    for step in (1, 2, 3):
        set_weights(model, float(step))
        for average in (here, there):
            average.update(model, step)
    assert all(s.device.type == "cpu" for s in there.sums.values())
    assert all(torch.equal(here.averaged()[name], there.averaged()[name]) for name in here.sums)
    assert all(s is not p for s, p in zip(there.sums.values(), model.parameters(), strict=True))


@pytest.mark.parametrize("device", ["same", "cpu"])
def test_averages_and_weights_are_swapped_one_by_one(device):
    """Besides the model's weights, those that wait and one average are held, never all averages."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    ema, size = EMA(model, EMAConfig(0.9, 1, device)), 4 * 64 * 64
    ema.update(model, 1)
    with LiveBytes() as live, ema.applied(model):
        pass
    assert live.peak_of_all <= (8 + 8 + 1) * size


def test_an_average_kept_off_the_gpu_is_applied_to_weights_on_it(model, cuda):
    model = model.to(cuda)
    average = EMA(model, EMAConfig(0.9, 1, "cpu"))
    average.update(model, 1)
    assert all(s.device.type == "cpu" for s in average.sums.values())
    own = [p.detach().clone() for p in model.parameters()]
    with average.applied(model):
        torch.testing.assert_close(list(model.parameters()), own)
    assert all(torch.equal(p, before) for p, before in zip(model.parameters(), own, strict=True))

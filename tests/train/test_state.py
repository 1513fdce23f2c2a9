"""Averaged weights (appendices A.2, B.2) and the correction of their start at zero."""

import pytest
import torch
from torch import nn

from dalle.train.config import EMAConfig
from dalle.train.state import EMA, bias_corrected


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def set_weights(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)


def follow(model: nn.Module, config: EMAConfig, values: list[float]) -> float:
    """The average after the weights have had these values at updates 1, 2, ..."""
    ema = EMA(model, config)
    for step, value in enumerate(values, start=1):
        set_weights(model, value)
        ema.update(model, step)
    return float(ema.averaged()["bias"][0])


def test_constant_weights_average_to_themselves_from_the_first_update_on(model):
    ema = EMA(model, EMAConfig(decay=0.999, update_every=1))
    for step in range(1, 6):
        ema.update(model, step)
        for name, p in model.named_parameters():
            torch.testing.assert_close(ema.averaged()[name], p.detach(), rtol=1e-5, atol=0)


def test_after_a_short_run_the_average_is_nearer_to_the_recent_weights_than_to_the_first(model):
    """100 updates from 0 to 1, the paper's decay every 25: without the correction it would stay near 0."""
    averaged = follow(model, EMAConfig(decay=0.99, update_every=25), [step / 100 for step in range(1, 101)])
    assert averaged == pytest.approx((0.25 + 0.5 + 0.75 + 1.0) / 4, abs=0.01)
    assert abs(averaged - 1) < abs(averaged - 0)


def test_the_average_is_the_written_out_sum(model):
    decay, values = 0.9, [1.0, 5.0, -2.0, 4.0]
    weights = [decay ** (len(values) - 1 - i) for i in range(len(values))]
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert follow(model, EMAConfig(decay, update_every=1), values) == pytest.approx(expected, rel=1e-5)


def test_only_every_nth_update_is_taken_in(model):
    assert follow(model, EMAConfig(decay=0.5, update_every=3), [9.0, 9.0, 1.0, 9.0, 9.0]) == pytest.approx(
        1.0
    )


def test_before_the_first_averaging_there_is_none_and_the_weights_stand(model):
    ema = EMA(model, EMAConfig(decay=0.99, update_every=25))
    ema.update(model, 1)
    own = model.weight.detach().clone()
    assert ema.averaged() == {}
    with ema.applied(model):
        assert torch.equal(model.weight, own)


def test_applied_holds_the_average_inside_and_restores_the_weights(model):
    ema = EMA(model, EMAConfig(decay=0.5, update_every=1))
    set_weights(model, 1.0)
    ema.update(model, 1)
    before = ema.averaged()["weight"].clone()
    set_weights(model, 7.0)

    def inside():
        with ema.applied(model):
            assert model.weight[0, 0].item() == pytest.approx(1.0)
            set_weights(model, 3.0)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        inside()
    assert model.weight[0, 0].item() == 7.0
    assert torch.equal(ema.averaged()["weight"], before)


def test_the_correction_divides_by_one_less_the_share_of_the_start():
    sums = {"w": torch.tensor([0.19])}
    assert bias_corrected(sums, 0.9, 2)["w"].item() == pytest.approx(1.0)
    assert bias_corrected(sums, 0.9, 0) == {}


def test_an_average_kept_on_the_cpu_is_the_same_average(model):
    here, there = (EMA(model, EMAConfig(0.9, 1, device)) for device in ("same", "cpu"))
    for step in (1, 2, 3):
        set_weights(model, float(step))
        for average in (here, there):
            average.update(model, step)
    assert all(s.device.type == "cpu" for s in there.sums.values())
    assert all(torch.equal(here.averaged()[name], there.averaged()[name]) for name in here.sums)
    assert all(s is not p for s, p in zip(there.sums.values(), model.parameters(), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to keep the average off")
def test_an_average_kept_off_the_gpu_is_applied_to_weights_on_it(model):
    model = model.cuda()
    average = EMA(model, EMAConfig(0.9, 1, "cpu"))
    average.update(model, 1)
    assert all(s.device.type == "cpu" for s in average.sums.values())
    own = [p.detach().clone() for p in model.parameters()]
    with average.applied(model):
        torch.testing.assert_close(list(model.parameters()), own)


@pytest.mark.parametrize(("decay", "every"), [(1.0, 1), (2.0, 1), (-0.1, 1), (0.9, 0)])
def test_averages_that_cannot_be_are_refused(decay, every):
    with pytest.raises(ValueError, match=r"decay must be in|update_every must be positive"):
        EMAConfig(decay, every)

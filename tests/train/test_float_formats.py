"""Rounding to formats of 16 bits: against torch's own formats, against the paper's numbers, and inside
Adam."""

import pytest
import torch
from torch import nn

from dalle.schedules import Schedule
from dalle.train.config import OptimizerConfig
from dalle.train.float_formats import HALF, MEAN, VARIANCE, FloatFormat, rounded
from dalle.train.optimizer import build_optimizers


def numbers(low: int, high: int) -> torch.Tensor:
    """Many fp32 numbers of both signs between two powers of two, with ties, zeros, Inf and NaN."""
    generator = torch.Generator().manual_seed(0)
    powers = torch.randint(low, high, (20000,), generator=generator)
    sampled = torch.ldexp(1 + torch.rand(20000, generator=generator), powers)
    ties = torch.ldexp(torch.randint(1, 4096, (4000,), generator=generator).float(), powers[:4000])
    special = torch.tensor([0.0, torch.inf, torch.nan])
    every = torch.cat([sampled, ties, special])
    return torch.cat([every, -every])


@pytest.mark.parametrize(
    ("form", "dtype", "low"),
    [(HALF, torch.float16, -28), (FloatFormat(5, 2, bias=15), torch.float8_e5m2, -20)],
)
def test_formats_that_torch_has_are_rounded_as_torch_does(form, dtype, low):
    """Subnormals, ties and overflow to Inf among them."""
    x = numbers(low, 18)
    torch.testing.assert_close(rounded(x, form), x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_1_6_9_ends_below_16_and_0_6_10_holds_the_variance_that_is_clipped_to_5():
    assert MEAN.largest == 15.984375
    assert rounded(torch.tensor([2.0**-67, 2.0**-68]), MEAN).tolist() == [2.0**-67, 0]
    assert 5 < VARIANCE.largest < 8
    assert rounded(torch.tensor([5.0, -1.0]), VARIANCE).tolist() == [5, 0]


@pytest.mark.parametrize("form", [MEAN, VARIANCE])
def test_rounding_twice_changes_nothing_and_errs_by_half_a_unit_at_most(form):
    x = numbers(-55, 2)
    x = x[x.isfinite() & (x > 0)]
    x = x[x < 4]
    once = rounded(x, form)
    assert torch.equal(rounded(once, form), once)
    assert ((once - x).abs() <= x * 2.0 ** -(form.significand + 1)).all()
    assert len(once.unique()) < len(x.unique())


def test_saturation_keeps_the_sign_and_nan():
    x = torch.tensor([100.0, -100.0, torch.inf, -torch.inf, torch.nan])
    top = MEAN.largest
    assert rounded(x, MEAN, saturate=True).tolist()[:4] == [top, -top, top, -top]
    assert rounded(x, MEAN).tolist()[:4] == [torch.inf, -torch.inf, torch.inf, -torch.inf]
    assert rounded(x, MEAN, saturate=True).isnan().tolist() == [False] * 4 + [True]


def updated(moments: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model after three updates of AdamW on tiny gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 8), nn.ModuleList([nn.Linear(8, 8)]))
    config = OptimizerConfig(lr=Schedule(0.1, 0.1), warmup_steps=0, state_dtype=moments)
    (optimizer,) = build_optimizers(model, config)
    for step in range(3):
        torch.manual_seed(step)
        for p in model.parameters():
            p.grad = 1e-6 * torch.randn_like(p)
        optimizer.step()
    return model, optimizer


def test_moments_of_the_layers_matrices_are_stored_in_the_papers_formats():
    model, optimizer = updated("paper")
    (layer,) = model[1]
    held = optimizer.state[layer.weight]
    assert torch.equal(held["exp_avg"], rounded(held["exp_avg"], MEAN))
    assert torch.equal(held["exp_avg_sq"], rounded(held["exp_avg_sq"], VARIANCE))
    assert (held["exp_avg_sq"] > 0).all()  # about 1e-12, which fp16 takes for 0
    for parameter in (layer.bias, model[0].weight):
        moment = optimizer.state[parameter]["exp_avg"]
        assert not torch.equal(moment, rounded(moment, MEAN))


def test_moments_in_the_papers_formats_change_an_update_slightly_and_fp32_moments_not_at_all():
    kept, paper = (dict(updated(moments)[0].named_parameters()) for moments in ("fp32", "paper"))
    assert torch.equal(kept["0.weight"], paper["0.weight"])
    assert not torch.equal(kept["1.0.weight"], paper["1.0.weight"])
    torch.testing.assert_close(kept, paper, rtol=0.01, atol=0.01)

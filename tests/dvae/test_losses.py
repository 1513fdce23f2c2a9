"""The objective of the dVAE (sections 2.1, A.2, A.3): dalle/dvae/losses.py."""

import math

import pytest
import torch
from torch import distributions

from dalle.dvae import losses
from dalle.dvae.losses import gumbel_softmax, kl_to_uniform, logit_laplace_log_prob
from dalle.dvae.model import map_pixels, unmap_pixels


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# The logit-Laplace density (A.3).


@pytest.mark.parametrize("mu", [-2.0, 0.0, 0.7])
@pytest.mark.parametrize("b", [0.1, 0.5, 1.0])
def test_the_density_integrates_to_one(mu, b):
    n = 200_000
    x = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    density = logit_laplace_log_prob(x, torch.tensor(mu), torch.tensor(b).double().log()).exp()
    assert float(density.mean()) == pytest.approx(1, abs=1e-4)


def test_the_density_is_that_of_the_sigmoid_of_a_laplace_variable():
    x = torch.rand(1000, dtype=torch.float64)
    mu, log_b = torch.randn(2, 1000, dtype=torch.float64) * 2
    laplace = distributions.Laplace(mu, log_b.exp())
    expected = distributions.TransformedDistribution(laplace, [distributions.SigmoidTransform()]).log_prob(x)
    torch.testing.assert_close(logit_laplace_log_prob(x, mu, log_b), expected)


@pytest.mark.parametrize("x", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("mu", [-1e4, -2.2, 0.0, 2.2, 1e4])
@pytest.mark.parametrize("log_b", [-20.0, 0.0, 20.0])
def test_value_and_gradient_are_exact_at_the_ends(x, mu, log_b):
    def with_gradient(dtype):
        inputs = [torch.tensor(value, dtype=dtype, requires_grad=True) for value in (x, mu, log_b)]
        value = logit_laplace_log_prob(*inputs)
        return torch.stack([value, *torch.autograd.grad(value, inputs)])

    single, double = with_gradient(torch.float32), with_gradient(torch.float64)
    assert torch.isfinite(single).all()
    tolerance = 20 * math.exp(max(-log_b, 0)) * 1e-7 + 1e-5
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=tolerance)


# The KL from the uniform distribution.


def test_kl_is_zero_at_equal_logits_and_ln_k_at_one_hot():
    for value in (-1e4, 0.0, 1e4):
        uniform = kl_to_uniform(torch.full((1, 8192, 1, 1), value))
        torch.testing.assert_close(uniform, torch.zeros(1, 1, 1), rtol=0, atol=1e-5)
    logits = torch.zeros(1, 8192, 1, 1)
    logits[0, 17] = 1e4
    kl = kl_to_uniform(logits.requires_grad_())
    torch.testing.assert_close(kl, torch.full((1, 1, 1), math.log(8192)))
    assert torch.isfinite(torch.autograd.grad(kl.sum(), logits)[0]).all()


def test_kl_equals_torch_distributions():
    logits = 3 * torch.randn(2, 10, 3, 4)
    q = distributions.Categorical(logits=logits.permute(0, 2, 3, 1))
    uniform = distributions.Categorical(logits=torch.zeros(10))
    torch.testing.assert_close(kl_to_uniform(logits), distributions.kl_divergence(q, uniform))


def test_kl_and_samples_are_computed_in_fp32():
    logits = torch.randn(1, 10, 2, 2, dtype=torch.bfloat16)
    assert kl_to_uniform(logits).dtype == gumbel_softmax(logits, 1.0).dtype == torch.float32


# Pixels between [0, 1] and (0.1, 0.9).


def test_the_pixel_maps_are_inverse_and_stay_in_range():
    pixels = torch.linspace(0, 1, 256)
    mapped = map_pixels(pixels)
    torch.testing.assert_close((mapped[0], mapped[-1]), (torch.tensor(0.1), torch.tensor(0.9)))
    torch.testing.assert_close(unmap_pixels(mapped), pixels)
    unmapped = unmap_pixels(torch.tensor([0.0, 0.05, 0.5, 0.95, 1.0]))
    torch.testing.assert_close(unmapped, torch.tensor([0, 0, 0.5, 1, 1]))


# The relaxation (2.1): Gumbel-softmax, no straight-through.


@pytest.mark.parametrize("tau", [1 / 16, 1.0])
def test_the_largest_entry_is_distributed_as_softmax_of_the_logits(tau):
    logits, n = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5]), 40_000
    largest = gumbel_softmax(logits.expand(n, 5), tau).argmax(dim=1)
    expected = n * torch.softmax(logits, dim=0)
    chi_square = ((torch.bincount(largest, minlength=5) - expected) ** 2 / expected).sum()
    assert chi_square < 23.5  # 4 degrees: once in 10,000


@pytest.mark.parametrize("tau", [1 / 16, 1.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_relaxed_samples_sum_to_one_and_are_finite(tau, scale):
    relaxed = gumbel_softmax(scale * torch.randn(4, 300, 10, 10), tau)
    assert torch.isfinite(relaxed).all()
    torch.testing.assert_close(relaxed.sum(dim=1), torch.ones(4, 10, 10))


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])  # torch.rand gives multiples of 2^-24, 0 included
def test_noise_at_the_ends_of_its_range_is_finite(monkeypatch, uniform):
    monkeypatch.setattr(losses, "numbers_by_place", lambda like, first: torch.full_like(like, uniform))
    relaxed = gumbel_softmax(torch.zeros(1, 4, 1, 1), 1 / 16)
    torch.testing.assert_close(relaxed, torch.full((1, 4, 1, 1), 0.25))


def test_a_low_temperature_approaches_one_hot():
    logits = torch.randn(1, 50, 20, 20)
    taus = (1.0, 1 / 4, 1 / 16, 1 / 256)
    sharpness = [float(gumbel_softmax(logits, tau).amax(dim=1).mean()) for tau in taus]
    assert sharpness == sorted(sharpness)
    assert sharpness[-1] > 0.99


def test_the_sample_is_soft_forward_and_backward():
    """The gradient is that of softmax((logits + noise) / tau); a straight-through sample would be one-hot."""
    logits, weight, tau = torch.randn(1, 6, 2, 2, requires_grad=True), torch.randn(1, 6, 2, 2), 1.0
    relaxed = gumbel_softmax(logits, tau)
    assert relaxed.max().item() < 0.999
    (gradient,) = torch.autograd.grad((weight * relaxed).sum(), logits)
    expected = relaxed * (weight - (weight * relaxed).sum(dim=1, keepdim=True)) / tau
    torch.testing.assert_close(gradient, expected)

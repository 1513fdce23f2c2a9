"""Losses of diffusion and the steps to train on (dalle/diffusion/losses.py)."""

import math
from statistics import NormalDist

import pytest
import torch

from dalle.diffusion.losses import (
    LossHistory,
    bits_per_dim,
    discretized_gaussian_log_prob,
    hybrid,
    log_ndtr,
    normal_kl,
    simple,
    stratified_steps,
    vlb_bits,
)
from dalle.diffusion.schedule import Denoised, Schedule, make_schedule
from tests.helpers.gaussian_world import GaussianWorld, normal_numbers, seeded_noises

VALUES = 2 * torch.arange(256) / 255 - 1


def test_l_simple_is_a_mean_per_example():
    output, target = normal_numbers(3, 2, 4, 5), normal_numbers(3, 2, 4, 5, seed=1)
    expected = torch.stack([torch.dist(*rows) ** 2 / 40 for rows in zip(output, target, strict=True)])
    torch.testing.assert_close(simple(output, target), expected)
    assert simple(output.bfloat16(), target).dtype == torch.float32


# The discretized Gaussian.


@pytest.mark.parametrize("mean", [-1.5, -1.0, -0.3, 0.0, 0.71, 1.0, 4.0])
@pytest.mark.parametrize("std", [0.001, 0.02, 0.4, 3.0])
def test_256_values_sum_to_one(mean, std):
    log_prob = discretized_gaussian_log_prob(VALUES, torch.tensor(mean), torch.tensor(std).log())
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_a_value_has_the_mass_of_its_bin():
    """Also far from the mean, on both sides, where a difference of two numbers near 1 would be nothing."""
    mean, std = 0.1, 0.15
    tail = NormalDist(0, std)
    for k in (1, 20, 100, 140, 200, 254):
        distance = abs(VALUES[k].item() - mean)
        expected = math.log(tail.cdf(-distance + 1 / 255) - tail.cdf(-distance - 1 / 255))
        found = discretized_gaussian_log_prob(VALUES[k], torch.tensor(mean), torch.tensor(std).log())
        assert found.item() == pytest.approx(expected, abs=1e-3)
    for k, expected in ((0, tail.cdf(-1 + 1 / 255 - mean)), (255, tail.cdf(-1 + 1 / 255 + mean))):
        found = discretized_gaussian_log_prob(VALUES[k], torch.tensor(mean), torch.tensor(std).log())
        assert found.item() == pytest.approx(math.log(expected), abs=1e-4)


def test_a_far_mean_and_a_tiny_scale_have_finite_gradients_that_point_to_the_value():
    mean = torch.tensor([-30.0, -1.0, 0.9, 30.0] * 3, requires_grad=True)
    log_scale = torch.full((12,), -7.0, requires_grad=True)
    x = VALUES[[0] * 4 + [100] * 4 + [255] * 4]
    log_prob = discretized_gaussian_log_prob(x, mean, log_scale)
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    assert log_scale.grad.isfinite().all()
    wrong = (x - mean).abs() > 0.01
    wrong &= ~((x == -1) & (mean < -1)) & ~((x == 1) & (mean > 1))  # the outer bins are open
    assert torch.equal(mean.grad.sign()[wrong], (x - mean).sign()[wrong])


def test_the_log_of_the_normal_distribution_and_its_gradient_are_those_of_float64():
    """Over the tail too: the gradient of torch's own is 4 % too small at -1000 in float32."""
    z = torch.cat([torch.linspace(-12, 5, 800), torch.tensor([-1e3, -1e5, -1.0])]).requires_grad_()
    exact = z.detach().double().requires_grad_()
    found, expected = log_ndtr(z), torch.special.log_ndtr(exact)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-9)
    for each in (found, expected):
        each.sum().backward()
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=1e-5, atol=1e-9)
    assert torch.autograd.grad(log_ndtr(z[[0, 800]] * -1e6).sum(), z)[0].isfinite().all()


# The variational bound.


def test_kl_of_normals_is_that_of_torch():
    mean1, mean2, log1, log2 = normal_numbers(4, 50)
    first = torch.distributions.Normal(mean1, (log1 / 2).exp())
    second = torch.distributions.Normal(mean2, (log2 / 2).exp())
    expected = torch.distributions.kl_divergence(first, second)
    torch.testing.assert_close(normal_kl(mean1, log1, mean2, log2), expected, rtol=1e-4, atol=1e-5)


def test_bits_of_the_exact_denoiser_are_the_entropy():
    """With the true p(x_{t-1} | x_t) the bound is tight, in any number of steps.

    The entropy is that of a Gaussian in bins of 2/255. The standard deviation of an image's bits is 0.02.
    """
    mean, std = 0.1, 0.2
    schedule = make_schedule("cosine", 30)
    k = ((mean + std * normal_numbers(16, 1, 64, 64) + 1) * 127.5).round().clamp(0, 255)
    x0 = k / 127.5 - 1
    expected = 0.5 * math.log2(2 * math.pi * math.e * std**2) + math.log2(127.5)
    bits = bits_per_dim(GaussianWorld(schedule, mean, std), x0, schedule, seeded_noises(*x0.shape))
    assert bits.shape == (16,)
    assert bits.mean().item() == pytest.approx(expected, abs=0.02)
    wrong = bits_per_dim(GaussianWorld(schedule, mean, 1.3 * std), x0, schedule, seeded_noises(*x0.shape))
    excess = NormalDist(0, std), NormalDist(0, 1.3 * std)
    kl = math.log(excess[1].stdev / std) + std**2 / excess[1].variance / 2 - 0.5
    assert wrong.mean().item() == pytest.approx(expected + kl / math.log(2), abs=0.02)


def test_a_schedule_that_stops_before_all_is_noise_pays_for_it():
    """By the KL of the marginal of x_T from the standard normal numbers that sampling starts from."""
    whole, mean, std = make_schedule("cosine", 30), 0.1, 0.2
    schedule = Schedule(whole.alpha_bar[:20], whole.times[:20])
    x0 = (127.5 * (mean + std * normal_numbers(16, 1, 64, 64) + 1)).round() / 127.5 - 1
    a = schedule.alpha_bar[-1].item()
    last = torch.distributions.Normal(a**0.5 * mean, (a * std**2 + 1 - a) ** 0.5)
    kl = torch.distributions.kl_divergence(last, torch.distributions.Normal(0.0, 1.0)).item()
    expected = 0.5 * math.log2(2 * math.pi * math.e * std**2) + math.log2(127.5) + kl / math.log(2)
    bits = bits_per_dim(GaussianWorld(schedule, mean, std), x0, schedule, seeded_noises(*x0.shape))
    assert kl > 0.01
    assert bits.mean().item() == pytest.approx(expected, abs=0.01)


def test_terms_of_rows_are_those_of_the_rows_alone():
    schedule = make_schedule("cosine", 9)
    x0, t = VALUES[torch.arange(3 * 8)].view(3, 2, 2, 2), torch.tensor([0, 8, 3])
    world = GaussianWorld(schedule, 0.1, 0.5)
    xt = schedule.add_noise(x0, normal_numbers(3, 2, 2, 2), t)
    together = vlb_bits(schedule, world(xt, t), x0, xt, t)
    for i in range(3):
        row, step = slice(i, i + 1), int(t[i])
        alone = vlb_bits(schedule, world(xt[row], step), x0[row], xt[row], step)
        torch.testing.assert_close(together[row], alone)
        if step == 0:
            found = world(xt[row], 0)
            nll = -discretized_gaussian_log_prob(x0[row], found.x0, found.log_variance / 2).mean()
            assert alone.item() == pytest.approx(nll.item() / math.log(2), rel=1e-5)


# L_hybrid.


@pytest.mark.parametrize("prediction", ["noise", "x0", "v"])
def test_the_mean_of_l_hybrid_has_the_gradient_of_l_simple_and_the_variance_that_of_l_vlb(prediction):
    schedule = make_schedule("cosine", 100)
    t = torch.tensor([0, 1, 50, 99])
    x0, noise = (
        VALUES[normal_numbers(4, 3, 4, 4).mul(40).add(128).long().clamp(0, 255)],
        normal_numbers(4, 3, 4, 4, seed=1),
    )
    mean, v = normal_numbers(2, 4, 3, 4, 4, seed=2).unbind()
    mean.requires_grad_()
    v.requires_grad_()
    loss = hybrid(schedule, torch.cat([mean, v], dim=1), x0, noise, t, prediction)
    by_mean, by_v = torch.autograd.grad(loss.sum(), (mean, v))

    plain = simple(mean, schedule.target(x0, noise, t, prediction))
    assert torch.equal(by_mean, torch.autograd.grad(plain.sum(), mean)[0])

    xt = schedule.add_noise(x0, noise, t)
    found = schedule.denoised(torch.cat([mean, v], dim=1), xt, t, prediction, "learned")
    vlb = vlb_bits(schedule, found, x0, xt, t)
    torch.testing.assert_close(loss, plain + 0.001 * 100 * vlb)
    torch.testing.assert_close(by_v, torch.autograd.grad(0.1 * vlb.sum(), v)[0])
    assert (by_v != 0).all()


def test_on_cuda_l_hybrid_and_its_gradient_are_those_of_the_cpu_without_float64(cuda):
    """With the steps on either device."""
    schedule = make_schedule("cosine", 10)
    x0, noise, t = VALUES[torch.arange(96)].view(2, 3, 4, 4), normal_numbers(2, 3, 4, 4), torch.tensor([0, 7])
    results = []
    for device, of_steps in (("cpu", "cpu"), (cuda, "cpu"), (cuda, cuda)):
        output = normal_numbers(2, 6, 4, 4, seed=2).to(device).requires_grad_()
        loss = hybrid(schedule, output, x0.to(device), noise.to(device), t.to(of_steps), "v")
        loss.sum().backward()
        results.append((loss.detach().cpu(), output.grad.cpu()))
    for one in results[1:]:
        torch.testing.assert_close(one, results[0], rtol=1e-4, atol=1e-5)


def test_l_vlb_is_least_at_the_true_variance():
    """A term as a function of v, against the expected square of the mean's error by simulation."""
    schedule = make_schedule("cosine", 20)
    x0, noise = (
        VALUES[normal_numbers(64, 1, 16, 16).mul(30).add(128).long()],
        normal_numbers(64, 1, 16, 16, seed=3),
    )
    t = torch.full((64,), 10)
    xt = schedule.add_noise(x0, noise, t)
    world = GaussianWorld(schedule, VALUES[128].item(), 30 * 2 / 255)
    found = world(xt, t)

    def term(shift):
        shifted = Denoised(found.x0, found.noise, found.log_variance + shift)
        return vlb_bits(schedule, shifted, x0, xt, t).mean()

    assert term(0.0) < min(term(-0.1), term(0.1))


def test_l_hybrid_refuses_an_output_without_variance():
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="needs a learned variance, 6 channels, got 3"):
        hybrid(make_schedule("cosine", 9), x, x, x, torch.zeros(2, dtype=torch.int64))


# Steps to train on.


def test_stratified_steps_have_one_in_each_part_and_are_uniform():
    uniform = torch.rand(2000, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    steps = torch.stack([stratified_steps(row, 20) for row in uniform])
    for i in range(8):
        assert steps[:, i].min() == i * 20 // 8
        assert steps[:, i].max() == -(-(i + 1) * 20 // 8) - 1
    counts, expected = torch.bincount(steps.flatten(), minlength=20), 2000 * 8 / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi-square, 19 degrees: once in 1,000
    assert stratified_steps(torch.ones(2), 20).tolist() == [10, 19]
    assert stratified_steps(torch.tensor([0.99]), 1000).tolist() == [990]


def full_history(num_steps=4):
    history = LossHistory(num_steps)
    for i in range(10):
        history.update(torch.arange(num_steps), torch.arange(num_steps) + 1.0 + i % 2)
    return history


def test_steps_are_uniform_until_each_has_ten_losses():
    history = LossHistory(3)
    for _ in range(10):
        history.update(torch.tensor([0, 1]), torch.tensor([9.0, 1.0]))
    history.update(torch.tensor([2] * 9), torch.ones(9))
    assert history.probabilities().tolist() == [1 / 3] * 3
    t, weight = history.sample(torch.tensor([0.0, 0.34, 0.99], dtype=torch.float64))
    assert (t.tolist(), weight.tolist()) == ([0, 1, 2], [1, 1, 1])
    history.update(torch.tensor([2]), torch.tensor([float("nan")]))
    assert history.probabilities().tolist() == [1 / 3] * 3
    history.update(torch.tensor([2]), torch.tensor([1.0]))
    torch.testing.assert_close(history.probabilities()[0].item(), 0.999 * 9 / 11 + 0.001 / 3)


def test_a_step_is_as_likely_as_the_root_mean_square_of_its_last_ten_losses():
    history = full_history()
    sizes = [math.sqrt(((i + 1) ** 2 + (i + 2) ** 2) / 2) for i in range(4)]
    expected = [0.999 * size / sum(sizes) + 0.001 / 4 for size in sizes]
    assert history.probabilities().tolist() == pytest.approx(expected)
    history.update(torch.zeros(10, dtype=torch.int64), torch.full((10,), 7.0))
    assert history.losses[0].tolist() == [7.0] * 10


def test_weights_make_the_sampled_mean_that_of_all_steps():
    history = full_history()
    uniform = torch.arange(100_000, dtype=torch.float64).add(0.5) / 100_000
    t, weight = history.sample(uniform)
    assert weight.dtype == torch.float32
    shares = torch.bincount(t) / 100_000
    torch.testing.assert_close(shares.double(), history.probabilities(), rtol=0, atol=2e-5)
    loss = torch.tensor([5.0, -1.0, 2.0, 10.0])
    assert (weight * loss[t]).mean().item() == pytest.approx(loss.mean().item(), abs=1e-3)
    assert history.sample(torch.ones(1, dtype=torch.float64))[0].tolist() == [3]


def test_a_resumed_history_continues():
    history, resumed = full_history(), LossHistory(4)
    state = history.state_dict()
    resumed.load_state_dict(state)
    for one in (history, resumed):
        one.update(torch.tensor([1, 1, 3]), torch.tensor([4.0, 5.0, 6.0]))
    assert torch.equal(history.losses, resumed.losses)
    assert torch.equal(history.counts, resumed.counts)
    with pytest.raises(RuntimeError, match=r"size mismatch for losses"):
        LossHistory(5).load_state_dict(state)

"""Guidance in a Gaussian world, against products of densities (dalle/diffusion/guidance.py)."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from dalle.diffusion.guidance import (
    classifier_free,
    classifier_free_batched,
    clip_x0,
    keep_known,
    score_gradient,
)
from dalle.diffusion.samplers import ancestral, ddim, dpm_solver
from dalle.diffusion.schedule import Denoised, make_schedule
from tests.helpers.gaussian_world import GaussianWorld, normal_numbers, seeded_noises

SHAPE = (4, 1, 60, 60)
GRID = np.linspace(-3, 3, 6001)


def sample(steps):
    return list(steps)[-1].x


def density(mean, std):
    return np.exp(-((GRID - mean) ** 2) / std**2 / 2) / std


def moments(product):
    """Mean and standard deviation of a density that is not normalized, on the grid."""
    product = product / product.sum()
    mean = (product * GRID).sum()
    return mean, math.sqrt((product * (GRID - mean) ** 2).sum())


def log_likelihood(schedule, mean, std, value, noise_std):
    """log p(y | x_t) where y = x_0 + noise_std times noise, and x_0 is N(mean, std^2)."""

    def log_prob(xt, times):
        a = schedule.alpha_bar[times.cpu()].float().view(-1, 1, 1, 1).to(xt.device)
        spread = a * std**2 + 1 - a
        guess = mean + a.sqrt() * std**2 / spread * (xt - a.sqrt() * mean)
        variance = std**2 * (1 - a) / spread + noise_std**2
        return (-((value - guess) ** 2) / variance / 2).flatten(1).sum(dim=1)

    return log_prob


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_classifier_free_guidance_of_two_gaussians_samples_their_product(scale):
    """conditional^s unconditional^(1 - s): with one variance, a mean beyond the conditional one."""
    conditional, unconditional, std = 0.3, -0.2, 0.25
    ratio = density(conditional, std) / density(unconditional, std)
    product = density(unconditional, std) * ratio**scale
    mean, spread = moments(product)
    schedule = make_schedule("linear", 1000, "100")
    guided = classifier_free(
        GaussianWorld(schedule, conditional, std), GaussianWorld(schedule, unconditional, std), scale
    )
    x = sample(ddim(guided, normal_numbers(*SHAPE), schedule))
    assert x.mean().item() == pytest.approx(mean, abs=0.015)
    assert x.std().item() == pytest.approx(spread, abs=0.015)


def test_guidance_mixes_the_noise_alone_and_keeps_the_conditional_variance():
    schedule, xt = make_schedule("cosine", 9), normal_numbers(2, 3)
    worlds = GaussianWorld(schedule, 0.5, 0.2), GaussianWorld(schedule, -0.5, 0.6)
    conditional, unconditional = (world(xt, 4) for world in worlds)
    found = classifier_free(*worlds, 3.0)(xt, 4)
    noise = unconditional.noise + 3 * (conditional.noise - unconditional.noise)
    torch.testing.assert_close(found.noise, noise)
    assert torch.equal(found.log_variance, conditional.log_variance)
    assert not torch.equal(found.log_variance, unconditional.log_variance)


@pytest.mark.parametrize("t", [5, torch.tensor([5, 0, 8])])
def test_one_call_for_both_is_two_calls(t):
    schedule, xt, calls = make_schedule("cosine", 9), normal_numbers(3, 1, 4, 4), []
    means = torch.tensor([0.5, -0.5]).repeat_interleave(3).view(6, 1, 1, 1)

    def both(xt, t):
        calls.append(len(xt))
        return GaussianWorld(schedule, means, 0.3)(xt, t)

    one = classifier_free_batched(both, 3.0)(xt, t)
    two = classifier_free(GaussianWorld(schedule, 0.5, 0.3), GaussianWorld(schedule, -0.5, 0.3), 3.0)(xt, t)
    assert calls == [6]
    for name in ("x0", "noise", "log_variance"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize("shift", ["mean", "noise"])
def test_the_gradient_of_a_likelihood_samples_the_posterior(shift):
    """Of x_0 given y = x_0 + noise: the product of the data's density and the likelihood."""
    mean, std, value, noise_std = -0.2, 0.3, 0.5, 0.4
    expected, spread = moments(density(mean, std) * density(value, noise_std))
    whole, schedule = make_schedule("linear"), make_schedule("linear", 1000, "250")
    log_prob = log_likelihood(whole, mean, std, value, noise_std)
    guided = score_gradient(GaussianWorld(schedule, mean, std), log_prob, schedule, 1.0, shift)
    x = normal_numbers(*SHAPE)
    steps = (
        ancestral(guided, x, schedule, seeded_noises(*SHAPE))
        if shift == "mean"
        else ddim(guided, x, schedule)
    )
    x = sample(steps)
    assert x.mean().item() == pytest.approx(expected, abs=0.02)
    assert x.std().item() == pytest.approx(spread, abs=0.02)


def test_a_gradient_shifts_the_mean_by_variance_and_the_noise_by_sigma():
    """Diffusion Beats GANs, Algorithms 1 and 2, each written out."""
    schedule, xt, scale = make_schedule("cosine", 9), normal_numbers(2, 1, 4, 4), 1.7
    world, direction = GaussianWorld(schedule, 0.2, 0.3), normal_numbers(2, 1, 4, 4, seed=5)
    told = []

    def log_prob(x, times):
        told.append(times.tolist())
        return (x * direction).flatten(1).sum(dim=1)

    for t in (0, 5):
        before = world(xt, t)
        with torch.inference_mode():
            mean = score_gradient(world, log_prob, schedule, scale, "mean")(xt, t)
            noise = score_gradient(world, log_prob, schedule, scale, "noise")(xt, t)
        shifted = schedule.posterior(before.x0, xt, t)[0] + scale * before.log_variance.exp() * direction
        torch.testing.assert_close(schedule.posterior(mean.x0, xt, t)[0], shifted, rtol=0, atol=1e-5)
        sigma = (1 - schedule.alpha_bar[t].item()) ** 0.5
        torch.testing.assert_close(noise.noise, before.noise - scale * sigma * direction, rtol=0, atol=1e-5)
    assert told == [[0, 0]] * 2 + [[5, 5]] * 2


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpm_solver"])
def test_known_pixels_are_in_the_sample_and_leave_the_others(sampler):
    schedule = make_schedule("cosine", 10)
    shape = (2, 3, 8, 8)
    known, mask = normal_numbers(*shape).clamp(-1, 1), torch.zeros(2, 1, 8, 8)
    mask[0, :, :3] = 1
    mask[1, :, :, 5:] = 1
    noises, x = seeded_noises(*shape), normal_numbers(*shape)
    run = {
        "ancestral": partial(ancestral, noises=noises),
        "ddim": partial(ddim, noises=noises, eta=0.5),
        "dpm_solver": dpm_solver,
    }[sampler]
    world = GaussianWorld(schedule, 0.4, 0.3)
    free = sample(run(world, x, schedule))
    steps = list(run(keep_known(world, known, mask, schedule), x, schedule))
    expected = torch.where(mask.bool(), known, free)
    torch.testing.assert_close(steps[-1].x, expected, rtol=0, atol=1e-6)
    for step in steps:
        assert torch.equal(step.denoised.x0[mask.bool().expand(shape)], known[mask.bool().expand(shape)])


@pytest.mark.parametrize("t", [0, 8, torch.tensor([0, 8])])
def test_x0_and_noise_agree_after_every_wrapper(t):
    schedule, xt = make_schedule("cosine", 9), 2 * normal_numbers(2, 1, 4, 4)
    world = GaussianWorld(schedule, torch.tensor([[1.2, 0.9, -1.2, 0.3]]), 0.5)
    known, mask = torch.ones(1, 1, 4, 4), torch.eye(4)[None, None]
    gradient = log_likelihood(schedule, 0.9, 0.5, 0.0, 0.5)
    for wrapped in (
        classifier_free(world, GaussianWorld(schedule, -0.9, 0.5), 3.0),
        score_gradient(world, gradient, schedule, 2.0, "mean"),
        score_gradient(world, gradient, schedule, 2.0, "noise"),
        keep_known(world, known, mask, schedule),
        clip_x0(world, schedule),
    ):
        found, before = wrapped(xt, t), world(xt, t)
        assert not torch.equal(found.x0, before.x0)
        torch.testing.assert_close(schedule.add_noise(found.x0, found.noise, t), xt, rtol=0, atol=1e-4)
        assert torch.equal(found.log_variance, before.log_variance)


def test_on_cuda_every_wrapper_gives_what_it_gives_on_the_cpu(cuda):
    schedule, xt, t = make_schedule("cosine", 9), normal_numbers(2, 1, 4, 4), torch.tensor([3, 8])
    world, results = GaussianWorld(schedule, 0.9, 0.5), []
    for device in ("cpu", cuda):
        known, mask = torch.ones(1, 1, 4, 4, device=device), torch.eye(4)[None, None].to(device)
        denoise = classifier_free(world, GaussianWorld(schedule, -0.9, 0.5), 3.0)
        denoise = clip_x0(keep_known(denoise, known, mask, schedule), schedule)
        for shift in ("mean", "noise"):
            guided = score_gradient(
                denoise, lambda x, times: -x.square().sum(dim=(1, 2, 3)), schedule, 2, shift
            )
            for steps in (5, t, t.to(device)):
                found = guided(xt.to(device), steps)
                results.append((found.x0.cpu(), found.noise.cpu(), found.log_variance.cpu()))
    half = len(results) // 2
    for here, there in zip(results[:half], results[half:], strict=True):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)


def fixed(x0):
    return lambda xt, t: Denoised(x0, torch.zeros_like(x0), torch.zeros_like(x0))


def test_clipping():
    schedule, xt = make_schedule("cosine", 9), torch.zeros(2, 5)
    x0 = torch.tensor([[-4.0, -2.0, 0.0, 1.0, 3.0], [0.1, -0.2, 0.3, 0.9, 0.5]])
    static = clip_x0(fixed(x0), schedule)(xt, 3).x0
    assert static.tolist() == x0.clamp(-1, 1).tolist()
    assert clip_x0(fixed(x0), schedule, limit=10)(xt, 3).x0.tolist() == x0.tolist()


def test_bad_arguments_are_refused():
    schedule = make_schedule("cosine", 9)
    world = GaussianWorld(schedule, 0, 1)
    with pytest.raises(ValueError, match="shift must be one of mean, noise, got 'eps'"):
        score_gradient(world, lambda x, times: x, schedule, 1.0, "eps")
    for mask in (torch.ones(1, 1, 4, 5), torch.ones(1, 3, 4, 4), torch.ones(4, 4)):
        with pytest.raises(ValueError, match="mask must be"):
            keep_known(world, torch.zeros(1, 3, 4, 4), mask, schedule)
    kept = keep_known(world, torch.zeros(1, 3, 4, 4), torch.ones(1, 1, 4, 4), schedule)
    with pytest.raises(ValueError, match=r"size \(3, 8, 8\), got \(3, 4, 4\); resize"):
        kept(torch.zeros(2, 3, 8, 8), 3)

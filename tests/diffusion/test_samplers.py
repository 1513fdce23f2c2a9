"""Samplers in a Gaussian world, where the result is known (dalle/diffusion/samplers.py)."""

import itertools

import pytest
import torch

from dalle.diffusion.guidance import clip_x0
from dalle.diffusion.losses import bits_per_dim
from dalle.diffusion.samplers import ancestral, ddim, ddim_invert, dpm_solver
from dalle.diffusion.schedule import Denoised, Schedule, denoiser, make_schedule
from dalle.sampling import candidate_normals
from tests.helpers.gaussian_world import GaussianWorld, normal_numbers, seeded_noises

SHAPE = (8, 1, 60, 60)
MEAN, STD = 0.4, 0.3


def sample(steps):
    """The last x of a sampler."""
    return list(steps)[-1].x


def assert_normal(x, mean=MEAN, std=STD, tolerance=0.01):
    """Mean and standard deviation within a tolerance; of 28,800 numbers the errors are 0.002 and 0.0013."""
    assert x.mean().item() == pytest.approx(mean, abs=tolerance)
    assert x.std().item() == pytest.approx(std, abs=tolerance)


@pytest.mark.parametrize("spacing", ["20", "100"])
def test_ancestral_sampling_reaches_mean_and_variance_with_the_true_variance(spacing):
    """In any number of steps: the true p(x_{t-1} | x_t) of Gaussians is Gaussian."""
    schedule = make_schedule("cosine", 1000, spacing)
    steps = ancestral(
        GaussianWorld(schedule, MEAN, STD), normal_numbers(*SHAPE), schedule, seeded_noises(*SHAPE)
    )
    assert_normal(sample(steps))


@pytest.mark.parametrize(("eta", "tolerance"), [(0.0, 0.01), (0.5, 0.01), (1.0, 0.02)])
def test_ddim_reaches_mean_and_variance(eta, tolerance):
    schedule = make_schedule("linear", 1000, "200")
    world = GaussianWorld(schedule, MEAN, STD)
    steps = ddim(world, normal_numbers(*SHAPE), schedule, seeded_noises(*SHAPE), eta)
    assert_normal(sample(steps), tolerance=tolerance)


def test_ddim_with_eta_1_is_ancestral_sampling_with_small_variance():
    schedule = make_schedule("cosine", 12)
    world = GaussianWorld(schedule, MEAN, STD)

    def small(xt, t):
        found = world(xt, t)
        variance = schedule.at(schedule.log_variances["small"], t, xt).expand_as(xt)
        return Denoised(found.x0, found.noise, variance)

    x, noises = normal_numbers(2, 3, 4, 4), seeded_noises(2, 3, 4, 4)
    one = ddim(world, x, schedule, noises, eta=1.0)
    for a, b in zip(one, ancestral(small, x, schedule, noises), strict=True):
        assert a.t == b.t
        torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-5)


def even_schedule(num_steps):
    """alpha_bar from sigmoid(8) to sigmoid(-8) in even steps of log SNR."""
    log_snr = torch.linspace(8, -8, num_steps + 1, dtype=torch.float64)
    return Schedule(log_snr.sigmoid(), torch.arange(num_steps + 1))


def flow_error(sampler, schedule):
    """Distance from the exact probability flow at step 0, before the last one removes the rest of noise."""
    world, z = GaussianWorld(schedule, MEAN, STD), normal_numbers(4, 100)
    a = schedule.alpha_bar.tolist()
    steps = list(sampler(world, world.marginal(a[-1], z), schedule))
    assert [step.t for step in steps] == list(reversed(range(len(schedule))))
    assert torch.equal(steps[-1].x, world(steps[-2].x, 0).x0)
    return (steps[-2].x - world.marginal(a[0], z)).abs().mean().item()


@pytest.mark.parametrize(("sampler", "least", "most"), [(ddim, 1.8, 2.3), (dpm_solver, 3.5, 4.6)])
def test_the_order_of_a_solver(sampler, least, most):
    """Twice the steps halve DDIM's error and quarter that of DPM-Solver++(2M)."""
    errors = [flow_error(sampler, even_schedule(num_steps)) for num_steps in (25, 50, 100)]
    for coarse, fine in itertools.pairwise(errors):
        assert least < coarse / fine < most, errors


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize(("spacing", "times"), [("15", 1.1), ("25", 1.5), ("dpm15", 5)])
def test_dpm_solver_is_nearer_than_ddim_with_as_many_steps(name, spacing, times):
    """Also where the last step is long, as in steps that are even in t."""
    schedule, errors = make_schedule(name, 1000, spacing), []
    for sampler in (dpm_solver, ddim):
        world, z = GaussianWorld(schedule, MEAN, STD), normal_numbers(4, 100)
        x = world.marginal(schedule.alpha_bar[-1].item(), z)
        errors.append((sample(sampler(world, x, schedule)) - world.marginal(1.0, z)).abs().mean())
    assert errors[0] < errors[1] / times


def test_dpm_solver_in_three_steps_is_ddim():
    schedule = make_schedule("linear", 1000, "3")
    world, x = GaussianWorld(schedule, MEAN, STD), normal_numbers(4, 10)
    torch.testing.assert_close(
        sample(dpm_solver(world, x, schedule)), sample(ddim(world, x, schedule)), rtol=0, atol=1e-5
    )


def test_inversion_finds_the_noise_and_ddim_returns():
    x0, found, back = MEAN + STD * normal_numbers(4, 100), [], []
    for num_steps in (50, 100):
        schedule = even_schedule(num_steps)
        world = GaussianWorld(schedule, MEAN, STD)
        steps = list(ddim_invert(world, x0, schedule))
        assert [step.t for step in steps] == list(range(len(schedule)))
        found.append((steps[-1].x - (x0 - MEAN) / STD).abs().mean().item())
        back.append((sample(ddim(world, steps[-1].x, schedule)) - x0).abs().mean().item())
    assert back[0] < 0.03
    assert back[1] < back[0] / 1.7
    assert found[0] < 0.2
    assert found[1] < found[0] / 1.7


@pytest.mark.parametrize("sampler", [ancestral, ddim, dpm_solver])
def test_a_sampler_starts_at_the_most_noise_and_has_no_graph(sampler):
    schedule = make_schedule("cosine", 5)
    x, asked = normal_numbers(2, 3), []

    def noises(t):
        asked.append(t)
        return normal_numbers(2, 3, seed=t)

    weight = torch.nn.Parameter(torch.tensor(1.0))
    world = GaussianWorld(schedule, weight * MEAN, STD)
    extra = (noises,) if sampler is ancestral else ()
    steps = sampler(world, x, schedule, *extra)
    first = next(steps)
    assert first.t == 4
    assert torch.equal(first.denoised.x0, world(x, 4).x0)
    assert not sample(steps).requires_grad
    assert asked == ([4, 3, 2, 1] if extra else [])
    assert torch.is_grad_enabled()


def keyed(seed, prompt, candidates, shape=(3, 4, 4)):
    return lambda t: candidate_normals(seed, prompt, candidates, t, shape)


@pytest.mark.parametrize(
    "run",
    [
        lambda world, noises, schedule: ancestral(world, noises(len(schedule)), schedule, noises),
        lambda world, noises, schedule: ddim(world, noises(len(schedule)), schedule, noises, eta=0.7),
        lambda world, noises, schedule: dpm_solver(world, noises(len(schedule)), schedule),
    ],
    ids=["ancestral", "ddim", "dpm_solver"],
)
def test_a_candidate_is_the_same_whatever_the_others(run):
    """Bit for bit, by numbers keyed by (seed, prompt, candidate, step)."""
    schedule = make_schedule("cosine", 10)
    world = GaussianWorld(schedule, MEAN, STD)
    many = sample(run(world, keyed(0, "a dog", range(5)), schedule))
    for candidates in (range(1), range(2, 4), range(4, 5)):
        few = sample(run(world, keyed(0, "a dog", candidates), schedule))
        assert torch.equal(few, many[candidates.start : candidates.stop])
    assert not torch.equal(many, sample(run(world, keyed(0, "a cat", range(5)), schedule)))


@pytest.mark.parametrize("sampler", [ancestral, ddim, dpm_solver, ddim_invert])
def test_autocast_is_for_the_network_alone(sampler):
    """The network's output is of half precision, the arithmetic around it fp32."""
    schedule, x = make_schedule("cosine", 5), normal_numbers(2, 3, 4, 4)
    denoise = clip_x0(denoiser(lambda xt, times: xt.tanh().bfloat16(), schedule, "v", "small"), schedule)
    extra = (seeded_noises(*x.shape),) if sampler is ancestral else ()
    expected = sample(sampler(denoise, x, schedule, *extra))
    with torch.autocast("cpu", torch.bfloat16):
        found = sample(sampler(denoise, x, schedule, *extra))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_on_cuda_samples_are_those_of_the_cpu_without_float64(cuda):
    schedule = make_schedule("cosine", 4)
    world, noises = GaussianWorld(schedule, MEAN, STD), seeded_noises(2, 3, 4, 4)
    x = normal_numbers(2, 3, 4, 4)
    for sampler, options in (
        (ancestral, {"noises": noises}),
        (ddim, {"noises": noises, "eta": 0.5}),
        (ddim_invert, {}),
        (dpm_solver, {}),
    ):
        here = sample(sampler(world, x, schedule, **options))
        if options:
            options["noises"] = lambda t: noises(t).to(cuda)
        there = sample(sampler(world, x.to(cuda), schedule, **options))
        assert there.device == cuda
        torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-5)
    bits = bits_per_dim(world, x, schedule, noises)
    there = bits_per_dim(world, x.to(cuda), schedule, lambda t: noises(t).to(cuda))
    torch.testing.assert_close(there.cpu(), bits, rtol=1e-4, atol=1e-4)


# Bad input.


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_an_eta_out_of_range_is_refused(eta):
    schedule = make_schedule("cosine", 5)
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\]"):
        next(ddim(GaussianWorld(schedule, 0, 1), torch.zeros(1, 1), schedule, seeded_noises(1, 1), eta))


def test_eta_without_noises_and_noises_of_another_shape_are_refused():
    schedule = make_schedule("cosine", 5)
    world, x = GaussianWorld(schedule, 0, 1), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="needs noises"):
        next(ddim(world, x, schedule, eta=0.5))
    with pytest.raises(ValueError, match=r"noises\(4\) must be \(2, 3\)"):
        next(ddim(world, x, schedule, seeded_noises(1, 3), eta=0.5))
    with pytest.raises(ValueError, match=r"noises\(4\) must be \(2, 3\)"):
        next(ancestral(world, x, schedule, seeded_noises(1, 3)))

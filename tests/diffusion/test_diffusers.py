"""Schedules and samplers beside those of diffusers, an independent implementation; its import is slow."""

import itertools

import pytest
import torch

from dalle.diffusion.guidance import clip_x0
from dalle.diffusion.samplers import ancestral, ddim, dpm_solver
from dalle.diffusion.schedule import denoiser, make_schedule
from tests.helpers.gaussian_world import normal_numbers, seeded_noises

pytestmark = pytest.mark.slow

BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"noise": "epsilon", "x0": "sample", "v": "v_prediction"}
SHAPE = (2, 3, 4, 4)


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="needs diffusers, the reference implementation")


def network(channels=3):
    """A function of x and time, no denoiser of anything."""
    weight = normal_numbers(channels, 3, seed=9) / 2

    def run(xt, times):
        output = torch.einsum("oc,bchw->bohw", weight, xt).tanh()
        return output + times.view(-1, 1, 1, 1) / 2000

    return run


def theirs(scheduler, model, x, times, **options):
    """The x after each step of a scheduler."""
    for time in times:
        output = model(x, torch.full([len(x)], time))
        x = scheduler.step(output, time, x, **{k: v(time) for k, v in options.items()}).prev_sample
        yield x


def assert_same(steps, expected, tolerance=2e-4):
    count = 0
    for step, x in zip(steps, expected, strict=True):
        torch.testing.assert_close(step.x, x, rtol=tolerance, atol=tolerance)
        count += 1
    assert count > 5


@pytest.mark.parametrize("name", BETAS)
def test_alpha_bar_is_theirs(name, diffusers):
    scheduler = diffusers.DDPMScheduler(beta_schedule=BETAS[name])
    ours = make_schedule(name).alpha_bar.float()
    torch.testing.assert_close(ours, scheduler.alphas_cumprod, rtol=1e-3, atol=1e-6)  # theirs in fp32


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["small", "learned"])
def test_ancestral_sampling_is_theirs(name, prediction, variance, diffusers, monkeypatch):
    schedule = make_schedule(name, 1000, "ddim50")
    if name == "cosine":
        schedule = make_schedule(name, 1000, "ddim25")
    times = schedule.times.tolist()[::-1]
    scheduler = diffusers.DDPMScheduler(
        beta_schedule=BETAS[name],
        prediction_type=PREDICTIONS[prediction],
        variance_type={"small": "fixed_small", "learned": "learned_range"}[variance],
    )
    scheduler.set_timesteps(timesteps=times)
    index = {time: t for t, time in enumerate(schedule.times.tolist())}
    noises, current = seeded_noises(*SHAPE), []
    module = diffusers.schedulers.scheduling_ddpm
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: noises(index[current[-1]]))

    model = network(6 if variance == "learned" else 3)

    def noting(xt, times):
        current.append(int(times[0]))
        return model(xt, times)

    x = normal_numbers(*SHAPE)
    denoise = clip_x0(denoiser(model, schedule, prediction, variance), schedule)
    assert_same(ancestral(denoise, x, schedule, noises), theirs(scheduler, noting, x, times))


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_is_theirs(name, prediction, eta, diffusers):
    schedule, model = make_schedule(name, 1000, "ddim25"), network()
    scheduler = diffusers.DDIMScheduler(beta_schedule=BETAS[name], prediction_type=PREDICTIONS[prediction])
    scheduler.set_timesteps(25)
    times = schedule.times.tolist()[::-1]
    assert scheduler.timesteps.tolist() == times
    noises, x = seeded_noises(*SHAPE), normal_numbers(*SHAPE)
    expected = theirs(
        scheduler, model, x, times,
        eta=lambda time: eta,
        use_clipped_model_output=lambda time: True,
        variance_noise=lambda time: noises(time // 40) if eta else None,
    )  # fmt: skip
    denoise = clip_x0(denoiser(model, schedule, prediction, "small"), schedule)
    assert_same(ddim(denoise, x, schedule, noises, eta), expected)


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dpm_solver_is_theirs(name, prediction, diffusers):
    """But for the step into the first one of the schedule, which they extrapolate."""
    schedule, model = make_schedule(name, 1000, "ddim20"), network()
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule=BETAS[name], prediction_type=PREDICTIONS[prediction]
    )
    times = schedule.times.tolist()[::-1]
    scheduler.set_timesteps(timesteps=times)
    x = normal_numbers(*SHAPE)
    steps = dpm_solver(denoiser(model, schedule, prediction, "small"), x, schedule)
    expected = theirs(scheduler, model, x, times)
    assert_same(itertools.islice(steps, 18), itertools.islice(expected, 18))

"""Schedules, respacing, predictions and the posterior (dalle/diffusion/schedule.py)."""

import math

import numpy as np
import pytest
import torch

from dalle.diffusion.schedule import Schedule, denoiser, make_schedule, respace
from tests.helpers.gaussian_world import normal_numbers

FAST27 = [0, 22, 44, 66, 88, 111, 133, 155, 177, 199]
FAST27 += [200, 222, 244, 266, 288, 311, 333, 355, 377, 399]
FAST27 += [400, 500, 599, 600, 799, 800, 997]


@pytest.mark.parametrize("num_steps", [1000, 250, 4000])
def test_linear_betas_are_those_of_ddpm_rescaled_to_the_number_of_steps(num_steps):
    product, expected = 1.0, []
    for t in range(num_steps):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / (num_steps - 1)) * 1000 / num_steps
        expected.append(product)
    schedule = make_schedule("linear", num_steps)
    np.testing.assert_allclose(schedule.alpha_bar.numpy(), expected, rtol=1e-9)
    assert schedule.times.tolist() == list(range(num_steps))


@pytest.mark.parametrize("num_steps", [10, 1000])
def test_cosine_alpha_bar_is_the_squared_cosine_but_where_beta_is_capped(num_steps):
    def f(t):
        return math.cos((t / num_steps + 0.008) / 1.008 * math.pi / 2) ** 2

    schedule = make_schedule("cosine", num_steps)
    expected = [f(t + 1) / f(0) for t in range(num_steps - 1)]
    np.testing.assert_allclose(schedule.alpha_bar[:-1].numpy(), expected, rtol=1e-9)
    assert schedule.beta[-1].item() == pytest.approx(0.999)


def test_known_values_of_alpha_bar_at_the_end():
    """4.0e-5 for linear is sqrt(1 - 4e-5) of noise: DDPM's L_T is about 1e-5 bits per dimension."""
    linear, cosine = make_schedule("linear"), make_schedule("cosine")
    assert linear.alpha_bar[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)
    assert cosine.alpha_bar[499].item() == pytest.approx(0.4938, abs=1e-3)


def test_the_posterior_is_bayes_rule_in_numbers():
    """q(x_{t-1} | x_t, x_0) as the normalized product of q(x_{t-1} | x_0) and q(x_t | x_{t-1}) on a grid."""
    schedule = make_schedule("cosine", 8)
    x = np.linspace(-6, 6, 200_001)
    for t in (1, 4, 7):
        x0, xt = 0.7, -0.4
        before, beta = schedule.alpha_bar[t - 1].item(), schedule.beta[t].item()
        log_q = -((x - math.sqrt(before) * x0) ** 2) / (1 - before) / 2
        log_q -= (xt - math.sqrt(1 - beta) * x) ** 2 / beta / 2
        q = np.exp(log_q - log_q.max())
        q /= q.sum()
        expected = (q * x).sum()
        spread = (q * (x - expected) ** 2).sum()
        mean, log_variance = schedule.posterior(torch.tensor([[x0]]), torch.tensor([[xt]]), t)
        assert mean.item() == pytest.approx(expected, abs=1e-5)
        assert log_variance.item() == pytest.approx(math.log(spread), abs=1e-4)


def test_the_fixed_variances_have_no_zero_at_the_first_step():
    schedule = make_schedule("cosine", 8)
    small, large = schedule.log_variances["small"], schedule.log_variances["large"]
    assert small.isfinite().all()
    assert small[0] == small[1] == large[0]
    assert torch.equal(large[1:], schedule.beta[1:].log())
    assert (small[1:] < large[1:]).all()


# Respacing.


def kept(num_steps, spacing):
    return make_schedule("cosine", num_steps, spacing).times.tolist()


def test_fast27_is_the_list_of_glide():
    assert kept(1000, "fast27") == FAST27
    assert kept(1000, "10,10,3,2,2") == [*FAST27[:-1], 999]


@pytest.mark.parametrize(
    ("num_steps", "spacing", "expected"),
    [
        (10, "4", [0, 3, 6, 9]),
        (10, "1,2", [0, 5, 9]),
        (13, "1,3,1", [0, 5, 7, 8, 9]),  # 1.5 is rounded within its part
        (10, "10", list(range(10))),
        (11, "2,3", [0, 5, 6, 8, 10]),  # parts of 6 and 5
        (1000, "ddim25", list(range(0, 1000, 40))),
        (10, "ddim4", [0, 3, 6, 9]),
        (1000, "21", [*range(0, 500, 50), 499, *range(549, 1000, 50)]),  # 499.5 as the published code rounds
    ],
)
def test_spacings(num_steps, spacing, expected):
    assert kept(num_steps, spacing) == expected


@pytest.mark.parametrize("spacing", ["100", "ddim25", "fast27", "10,10,3,2,2"])
def test_a_respaced_schedule_keeps_alpha_bar_and_the_times_of_the_network(spacing):
    schedule = make_schedule("cosine")
    short = respace(schedule, spacing)
    kept = short.times
    assert torch.equal(short.alpha_bar, schedule.alpha_bar[kept])
    betas = 1 - np.exp(np.diff(schedule.alpha_bar[kept].log().numpy(), prepend=0))
    np.testing.assert_allclose(short.beta.numpy(), betas, rtol=1e-9)
    assert torch.equal(make_schedule("cosine", 1000, spacing).alpha_bar, short.alpha_bar)


def test_respacing_twice_tells_the_times_of_the_trained_schedule():
    twice = respace(make_schedule("cosine", 1000, "ddim100"), "ddim10")
    assert twice.times.tolist() == list(range(0, 1000, 100))


def test_steps_for_dpm_solver_are_even_in_log_snr():
    schedule = make_schedule("linear", 1000, "dpm20")
    steps = torch.logit(schedule.alpha_bar).diff()
    assert (len(schedule), schedule.times[0], schedule.times[-1]) == (20, 0, 999)
    assert (steps / steps.mean() - 1).abs().max() < 0.5  # the first steps of the schedule are that coarse
    assert (steps / steps.mean() - 1)[3:].abs().max() < 0.05
    fewer = make_schedule("cosine", 1000, "dpm25")  # beyond its last steps log SNR falls steeply
    assert 15 < len(fewer) < 25
    assert (fewer.times.diff() > 0).all()


# Predictions.


@pytest.mark.parametrize("t", [0, 3, torch.tensor([0, 3, 7, 5])])
@pytest.mark.parametrize("prediction", ["noise", "x0", "v"])
def test_the_target_of_each_prediction_gives_back_x0_and_noise(prediction, t):
    schedule = make_schedule("cosine", 9)
    x0, noise = normal_numbers(4, 3, 2, 2), normal_numbers(4, 3, 2, 2, seed=1)
    xt = schedule.add_noise(x0, noise, t)
    target = schedule.target(x0, noise, t, prediction)
    found = schedule.denoised(target, xt, t, prediction, "small")
    torch.testing.assert_close(found.x0, x0, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.noise, noise, rtol=0, atol=1e-4)


def test_v_is_the_derivative_of_x_by_the_angle():
    """Salimans and Ho, appendix D: x = cos(angle) x0 + sin(angle) noise."""
    schedule = make_schedule("cosine", 9)
    x0, noise = torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([[-1.1]], dtype=torch.float64)
    angle = math.acos(schedule.alpha_bar[4].sqrt().item())
    by, h = lambda angle: math.cos(angle) * x0 + math.sin(angle) * noise, 1e-5
    derivative = (by(angle + h) - by(angle - h)) / (2 * h)
    torch.testing.assert_close(schedule.target(x0, noise, 4, "v"), derivative, rtol=0, atol=1e-6)


def test_steps_of_rows_are_those_of_the_rows_alone():
    schedule = make_schedule("linear", 50)
    x0, noise, t = normal_numbers(3, 5), normal_numbers(3, 5, seed=1), torch.tensor([49, 0, 20])
    together = schedule.add_noise(x0, noise, t)
    for i in range(3):
        alone = schedule.add_noise(x0[i : i + 1], noise[i : i + 1], int(t[i]))
        assert torch.equal(together[i : i + 1], alone)


def test_a_learned_variance_is_between_the_fixed_ones():
    schedule = make_schedule("cosine", 9)
    xt, v = torch.zeros(1, 1, 3, 1), torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 3, 1)
    found = schedule.denoised(torch.cat([xt, v], dim=1), xt, 5, "noise", "learned")
    beta = schedule.beta[5].item()
    small = beta * (1 - schedule.alpha_bar[4].item()) / (1 - schedule.alpha_bar[5].item())
    expected = [small, math.sqrt(small * beta), beta]
    torch.testing.assert_close(found.log_variance.exp().flatten(), torch.tensor(expected))


def test_a_network_is_told_its_own_times():
    schedule, told = make_schedule("cosine", 1000, "ddim10"), []

    def network(xt, times):
        told.append(times)
        return torch.cat([xt, xt], dim=1)

    denoise = denoiser(network, schedule, "noise", "learned")
    x = normal_numbers(2, 3, 4, 4)
    one, rows = denoise(x, 7), denoise(x, torch.tensor([7, 7]))
    assert [times.tolist() for times in told] == [[700, 700], [700, 700]]
    assert told[0].dtype == torch.int64
    assert torch.equal(one.x0, rows.x0)


def test_half_precision_of_a_network_ends_at_its_output():
    schedule = make_schedule("cosine", 9)
    xt = normal_numbers(2, 3)
    found = schedule.denoised(xt.bfloat16(), xt, 3, "v", "small")
    assert {found.x0.dtype, found.noise.dtype, found.log_variance.dtype} == {torch.float32}


# Bad input.


@pytest.mark.parametrize("t", [9, -1, torch.tensor([0, 9]), torch.tensor([-1, 0])])
def test_steps_beyond_the_schedule_are_refused(t):
    with pytest.raises(ValueError, match=r"steps must be in \[0, 9\)"):
        make_schedule("cosine", 9).add_noise(torch.zeros(2, 3), torch.zeros(2, 3), t)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sigmoid", 1000), "linear or cosine, got 'sigmoid'"),
        (("linear", 20), "more than 20 steps, got 20"),
        (("cosine", 1), "at least 2 steps"),
        (("cosine", 1000, "1"), "T at least 2"),
    ],
)
def test_schedules_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(*arguments)


@pytest.mark.parametrize(
    ("spacing", "message"),
    [
        *((text, "spacing must be like") for text in ("", "fast", "0", "-3", "1001", "10,,3", "1e2", "²")),
        *((text, "spacing must be like") for text in ("ddim", "ddim10,10", "dpm", "dpm5,5", "dpm0")),
        ("ddim600", "no whole stride gives ddim600 of 1000 steps"),
        ("10,600", "takes 600 of 500 steps"),
    ],
)
def test_unknown_spacings_are_refused(spacing, message):
    with pytest.raises(ValueError, match=message):
        make_schedule("linear", 1000, spacing)


def test_a_schedule_that_rises_or_is_no_float64_is_refused():
    falling, times = torch.tensor([0.9, 0.5], dtype=torch.float64), torch.arange(2)
    for wrong, message in (
        (falling.flip(0), "must fall"),
        (falling.float(), "float64"),
        (falling * 2, "fall"),
    ):
        with pytest.raises(ValueError, match=message):
            Schedule(wrong, times)
    with pytest.raises(ValueError, match="one per step"):
        Schedule(falling, torch.arange(3))


@pytest.mark.parametrize(
    ("channels", "prediction", "variance", "message"),
    [
        (3, "noise", "learned", r"\(2, 6, 4, 4\) for learned variance, got \(2, 3, 4, 4\)"),
        (6, "noise", "small", r"\(2, 3, 4, 4\) for small variance"),
        (3, "epsilon", "small", "prediction must be one of noise, x0, v, got 'epsilon'"),
        (3, "noise", "fixed", "variance must be one of learned, small, large"),
    ],
)
def test_an_output_that_is_not_what_was_said_is_refused(channels, prediction, variance, message):
    with pytest.raises(ValueError, match=message):
        make_schedule("cosine", 9).denoised(
            torch.zeros(2, channels, 4, 4), torch.zeros(2, 3, 4, 4), 1, prediction, variance
        )

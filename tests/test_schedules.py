"""Schedules of a value over steps (appendices A.2, B.2; dalle/schedules.py)."""

import math

import pytest

from dalle.commands.train_dvae import PAPER_TRAINING
from dalle.dvae import DVAELossConfig
from dalle.schedules import Schedule
from dalle.train import TrainConfig
from dalle.train.config import OptimizerConfig


@pytest.mark.parametrize("shape", ["cosine", "linear"])
@pytest.mark.parametrize(("step", "value"), [(0, 2.0), (50, 5.0), (100, 8.0), (10**9, 8.0), (-1, 2.0)])
def test_both_shapes_meet_at_the_start_half_way_and_from_the_end_on(shape, step, value):
    assert Schedule(2.0, 8.0, 100, shape)(step) == pytest.approx(value)


def test_a_quarter_of_the_way_a_line_has_a_quarter_and_a_cosine_less():
    assert Schedule(0.0, 1.0, 100, "linear")(25) == pytest.approx(0.25)
    assert Schedule(0.0, 1.0, 100, "cosine")(25) == pytest.approx((1 - math.sqrt(0.5)) / 2)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_a_schedule_never_turns_back(shape):
    values = [Schedule(1e-4, 1.25e-6, 997, shape)(step) for step in range(1000)]
    assert values == sorted(values, reverse=True)


def test_the_end_is_met_exactly_and_takes_a_step_or_more():
    assert Schedule(1.0, 1 / 16, 150_000)(150_000) == 1 / 16
    with pytest.raises(ValueError, match="decay_steps"):
        Schedule(0.0, 1.0, 0)


@pytest.mark.parametrize(
    ("step", "tau", "beta", "lr"),
    [
        (0, 1.0, 0.0, 1e-4),
        (2_500, 1.0, 3.3, 1e-4),
        (5_000, 1.0, 6.6, 1e-4),
        (75_000, (1 + 1 / 16) / 2, 6.6, 9.9e-5),
        (150_000, 1 / 16, 6.6, 9.6e-5),
        (600_000, 1 / 16, 6.6, (1e-4 + 1.25e-6) / 2),
        (1_200_000, 1 / 16, 6.6, 1.25e-6),
        (3_000_000, 1 / 16, 6.6, 1.25e-6),
    ],
)
def test_the_dvae_follows_the_papers_schedules(step, tau, beta, lr):
    """A.2, at named updates."""
    loss = DVAELossConfig()
    assert loss.tau(step) == pytest.approx(tau, rel=0.01)
    assert loss.beta(step) == pytest.approx(beta, rel=0.01)
    assert PAPER_TRAINING.optimizer.lr_at(step) == pytest.approx(lr, rel=0.01)


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "rates"),
    [
        (Schedule(1.0, 1.0), 10, {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 1000: 1.0}),  # from the first step
        (Schedule(1.0, 1.0), 0, {0: 1.0}),
        (Schedule(1.0, 0.0, 100, "linear"), 10, {4: 0.5 * 0.96}),  # the schedule runs from the first step too
    ],
)
def test_warmup_rises_linearly_and_multiplies_the_schedule(schedule, warmup_steps, rates):
    config = OptimizerConfig(lr=schedule, warmup_steps=warmup_steps)
    assert {step: config.lr_at(step) for step in rates} == pytest.approx(rates)


def test_the_warmup_of_the_transformer_is_the_papers():
    """B.2: 5,000 updates up to 4.5e-4."""
    config = TrainConfig().optimizer
    rates = [config.lr_at(step) for step in (0, 2499, 4999, 429_999)]
    assert rates == pytest.approx([4.5e-4 / 5000, 4.5e-4 / 2, 4.5e-4, 4.5e-4])

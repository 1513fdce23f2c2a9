"""Short trainings at several learning rates."""

from dataclasses import replace

import pytest

from dalle.commands.lr_sweep import last_loss, sweep
from tests.helpers.refusals import assert_refused


def test_a_sweep_trains_at_each_learning_rate_and_plots_them(chain, tiny_runs, with_inputs, tmp_path, capsys):
    """A diverging run does not end it."""
    run = with_inputs(tiny_runs.clip, chain, out=tmp_path / "sweep", steps=3)
    optimizer = replace(run.train.optimizer, warmup_steps=0)
    base = optimizer.lr.initial
    losses = sweep("clip", replace(run, train=replace(run.train, optimizer=optimizer)), [0.5, 1e40, 1.0])
    assert list(losses) == [0.5 * base, 1e40 * base, base]
    assert losses[base] == last_loss(tmp_path / "sweep" / f"lr-{base:g}")
    assert losses[1e40 * base] == float("inf")
    assert (tmp_path / "sweep" / "lr_sweep.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert printed.count("<- lowest") == 1
    assert "diverged" in printed


def test_a_sweep_needs_factors(tiny_runs):
    with pytest.raises(ValueError, match="give factors on the learning rate, each above 0"):
        sweep("clip", tiny_runs.clip, [])


def test_a_factor_is_a_number(script):
    assert_refused(script("lr_sweep", "1", "2x", "--kind", "clip"), "must be numbers: .*2x")

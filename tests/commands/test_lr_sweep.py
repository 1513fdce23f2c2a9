"""Short trainings at several learning rates."""

from dataclasses import replace

import pytest

from dalle.commands.lr_sweep import last_loss, sweep


def test_a_sweep_trains_at_each_learning_rate_and_plots_them(chain, tiny_runs, with_inputs, tmp_path, capsys):
    run = with_inputs(tiny_runs.clip, chain, out=tmp_path / "sweep", steps=3)
    base = run.train.optimizer.lr.initial
    losses = sweep("clip", run, [0.5, 1.0])
    assert list(losses) == [0.5 * base, base]
    assert losses[base] == last_loss(tmp_path / "sweep" / f"lr-{base:g}")
    assert (tmp_path / "sweep" / "lr_sweep.png").stat().st_size > 1000
    assert capsys.readouterr().out.count("<- lowest") == 1


def test_a_diverging_run_does_not_end_the_sweep(chain, tiny_runs, with_inputs, tmp_path, capsys):
    run = with_inputs(tiny_runs.clip, chain, out=tmp_path / "sweep", steps=3)
    optimizer = replace(run.train.optimizer, warmup_steps=0)
    losses = sweep("clip", replace(run, train=replace(run.train, optimizer=optimizer)), [1.0, 1e40])
    assert losses[1e40 * run.train.optimizer.lr.initial] == float("inf")
    assert "diverged" in capsys.readouterr().out


def test_a_sweep_needs_factors(tiny_runs):
    with pytest.raises(ValueError, match="give factors on the learning rate, each above 0"):
        sweep("clip", tiny_runs.clip, [])

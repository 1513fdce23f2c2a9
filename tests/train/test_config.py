"""Settings of a training: those that cannot be, and those that may change when a run resumes."""

from dataclasses import replace

import pytest

from dalle.commands.train_clip import TrainCLIPArgs
from dalle.commands.train_transformer import TrainTransformerArgs
from dalle.schedules import Schedule
from dalle.train.config import (
    EMAConfig,
    LogConfig,
    OptimizerConfig,
    PlateauConfig,
    PowerSGDConfig,
    TrainArgs,
    TrainConfig,
    resume_fingerprint,
)
from dalle.train.trainer import differences


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        (OptimizerConfig, {"muon_lr_scale": 0.0}, "muon_lr_scale must be positive"),
        (OptimizerConfig, {"warmup_steps": -5}, "cannot be negative"),
        (OptimizerConfig, {"lr": Schedule(-1.0, 0.1)}, "cannot be negative"),
        (OptimizerConfig, {"max_grad_norm": float("nan")}, "max_grad_norm must be a finite number"),
        (OptimizerConfig, {"eps": float("nan")}, "eps must be a finite number"),
        (Schedule, {"initial": 0.1, "final": float("nan")}, "final must be a finite number"),
        (OptimizerConfig, {"max_variance": 0.0}, "max_variance"),
        (OptimizerConfig, {"max_variance": 5.0, "beta2": 0.0}, "beta2 must be in"),
        (OptimizerConfig, {"state_dtype": "8bit"}, "set optimizer.max_variance to null"),
        (PlateauConfig, {"max_reductions": -1}, "cannot be negative"),
        (PlateauConfig, {"window": 0}, "cannot be negative"),
        (PlateauConfig, {"patience": 0}, "cannot be negative"),
        (PlateauConfig, {"threshold": -0.1}, "cannot be negative"),
        (EMAConfig, {"decay": 1.0}, "decay must be in"),
        (EMAConfig, {"decay": -0.1}, "decay must be in"),
        (EMAConfig, {"update_every": 0}, "update_every must be positive"),
        (PowerSGDConfig, {"rank": 0}, "rank must be positive"),
        (PowerSGDConfig, {"start_step": -1}, "start_step cannot be negative"),
        (LogConfig, {"loggers": ("tensorbord",)}, "unknown logger"),
        (LogConfig, {"peak_flops": 0.0}, "peak_flops must be positive"),
        (TrainConfig, {"max_skipped_steps": 0}, "max_skipped_steps must be positive"),
        (TrainConfig, {"save_every": 2, "keep_every": 0}, "keep_every must be positive"),
        (TrainConfig, {"save_every": 2, "keep_every": 3}, "keep_every 3 is no multiple of save_every 2"),
        (TrainArgs, {"dist_timeout_minutes": 0}, "dist_timeout_minutes must be positive"),
        (TrainTransformerArgs, {"sample_grid_size": -1}, "sample_grid_size cannot be negative"),
        (TrainCLIPArgs, {"train": TrainConfig(grad_accum_steps=2)}, "grad_accum_steps changes"),
    ],
)
def test_settings_that_cannot_be_are_refused(config, settings, words):
    with pytest.raises(ValueError, match=words):
        config(**settings)


def test_what_leaves_the_weights_alone_may_change_when_a_run_resumes(tiny_runs):
    """Intervals, loggers, and how processes and passes share the work."""
    run = tiny_runs.transformer
    often = {"log_every": 5, "save_every": 4, "keep_last": 3, "keep_every": 8, "grad_accum_steps": 2}
    other = replace(run, parallel="hsdp", shard=2, log=LogConfig(loggers=("wandb",)))
    other = replace(other, train=replace(run.train, **often))
    assert resume_fingerprint(other) == resume_fingerprint(run)
    for change in ({"batch_size": 8}, {"precision": "bf16"}, {"tf32": False}):
        assert resume_fingerprint(replace(run, train=replace(run.train, **change))) != resume_fingerprint(run)


def test_settings_that_an_earlier_run_did_not_know_were_off():
    old, off = {"model": {"depth": 2}}, {"qk_norm": False, "rate": 0.0, "every": None}
    assert differences(old, {"model": {"depth": 2, **off}}) == []
    assert differences(old, {"model": {"depth": 2, "qk_norm": True}}) == ["model.qk_norm was None, is True"]
    assert differences({"every": 4}, {"every": None}) == ["every was 4, is None"]

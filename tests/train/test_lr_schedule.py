"""The learning rate is halved when the training loss plateaus (B.2), on losses made by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor, nn

from dalle.train.checkpoint import latest_checkpoint
from dalle.train.config import NO_PLATEAU, OptimizerConfig, PlateauConfig
from dalle.train.loggers import read_log
from dalle.train.optimizer import ReduceLROnPlateau
from dalle.types import Loss
from tests.helpers.line import CONFIG, fit_line


def halved_at(losses: list[float], **settings) -> list[int]:
    """Updates, counted from 1, after which the learning rate was halved."""
    plateau, found = ReduceLROnPlateau(PlateauConfig(**settings)), []
    for update, loss in enumerate(losses, 1):
        before = plateau.reductions
        plateau.step(loss)
        if plateau.reductions > before:
            found.append(update)
    return found


def test_the_paper_halves_five_times_and_ends_at_a_32nd():
    plateau = ReduceLROnPlateau(PlateauConfig(window=1, patience=1))
    for _ in range(100):
        plateau.step(1.0)
    assert PlateauConfig().max_reductions == plateau.reductions == 5
    assert OptimizerConfig().lr_at(5000) * plateau.factor == pytest.approx(1.40625e-5)


@pytest.mark.parametrize(
    ("losses", "settings", "halved"),
    [
        ([10 - 0.1 * i for i in range(60)], {"window": 2, "patience": 2}, []),  # falls
        ([1.0] * 30, {"window": 2, "patience": 3, "max_reductions": 3}, [8, 14, 20]),  # flat
        ([3.0, 3.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0], {"window": 1, "patience": 3}, [9]),  # falls late
        # gains below `threshold` add up, since the best reading stands until it is beaten by as much
        ([1 - 0.004 * i for i in range(100)], {"window": 1, "patience": 4, "threshold": 0.01}, []),
        ([1 - 0.002 * i for i in range(10)], {"window": 1, "patience": 4, "threshold": 0.01}, [5]),
    ],
)
def test_a_plateau_halves_when_patience_runs_out(losses, settings, halved):
    assert halved_at(losses, **settings) == halved


def test_the_noise_of_updates_is_averaged_out():
    noisy = [1.0 + (0.5 if i % 2 else -0.5) for i in range(40)]
    assert halved_at(noisy, window=2, patience=2) == halved_at([1.0] * 40, window=2, patience=2)


@pytest.mark.parametrize(
    "settings", [{"max_reductions": -1}, {"window": 0}, {"patience": 0}, {"threshold": -0.1}]
)
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ValueError, match="cannot be negative"):
        PlateauConfig(**settings)


def flat(model: nn.Module, batch: Tensor, step: int) -> Loss:
    """1, whatever the weights, with a gradient."""
    out = model(batch).sum()
    return Loss(1 + out - out.detach())


def train(out: Path, steps: int, plateau: PlateauConfig) -> list[float]:
    """The learning rates of a run on `flat`."""
    fit_line(out, steps, flat, optimizer=replace(CONFIG.optimizer, plateau=plateau))
    return [line["lr"] for line in read_log(out / "log.jsonl")]


SHORT = PlateauConfig(max_reductions=2, window=2, patience=1)


def test_the_step_size_of_the_next_update_is_the_halved_one(tmp_path):
    """Readings after 2 (the best), 4 and 6 (halved)."""
    assert train(tmp_path, 8, SHORT) == pytest.approx([0.1] * 4 + [0.05] * 2 + [0.025] * 2)
    assert [line["lr_reductions"] for line in read_log(tmp_path / "log.jsonl")] == [0, 0, 0, 1, 1, 2, 2, 2]


def test_without_it_the_schedule_alone_counts(tmp_path):
    assert train(tmp_path, 8, NO_PLATEAU) == pytest.approx([0.1] * 8)
    assert "lr_reductions" not in read_log(tmp_path / "log.jsonl")[0]


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_stopping_and_going_on_halves_at_the_same_update(stop, tmp_path):
    """In the middle of a reading, after one, and after a halving."""
    whole = train(tmp_path / "whole", 8, SHORT)
    train(tmp_path / "split", stop, SHORT)
    assert train(tmp_path / "split", 8, SHORT) == whole
    files = [(latest_checkpoint(tmp_path / name) / "meta.json").read_text() for name in ("whole", "split")]
    assert files[0] == files[1]


def test_a_checkpoint_before_the_first_reading_is_plain_json(tmp_path):
    train(tmp_path, 1, SHORT)
    assert "Infinity" not in (latest_checkpoint(tmp_path) / "meta.json").read_text()

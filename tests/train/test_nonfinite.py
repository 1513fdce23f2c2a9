"""Updates that are not finite are skipped and counted, and end the run when too many come in a row."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dalle.schedules import Schedule
from dalle.train import TrainConfig, Trainer
from dalle.train.checkpoint import latest_checkpoint
from dalle.train.config import EMAConfig, OptimizerConfig
from dalle.train.grad_scaler import BACKOFF_INTERVAL
from dalle.train.loggers import read_log
from dalle.train.nonfinite import NonfiniteGuard
from dalle.types import Loss


def bad_at(*steps: int, by: str = "gradient"):
    """An objective whose gradient, or loss, is not finite at these steps, counted from 0."""

    def objective(model: nn.Module, batch: Tensor, step: int) -> Loss:
        out = model(batch)
        if step in steps and by == "gradient":
            out = out + (0 * out).abs().sqrt()  # 0, with a gradient of infinity times 0
        loss = (out - 2 * batch).square().mean()
        return Loss(loss + torch.inf if step in steps and by == "loss" else loss)

    return objective


def train(out: Path, steps: int, objective, seen: list | None = None, **changes):
    """A line fitted; the state after it."""
    torch.manual_seed(0)
    settings = {"max_skipped_steps": 3, "ema": EMAConfig(0.9, 1)} | changes
    config = TrainConfig(
        batch_size=4,
        precision="fp32",
        log_every=1,
        save_every=1,
        **settings,
        optimizer=OptimizerConfig(lr=Schedule(0.1, 0.1), warmup_steps=0),
    )
    meta = {"kind": "line", "config": {}, "inputs": {}}
    return Trainer(
        nn.Linear(1, 1),
        objective,
        lambda step: torch.linspace(-1, 1, 4)[:, None] + step,
        config,
        steps=steps,
        seed=0,
        run_dir=out,
        meta=meta,
    ).train()


def contents(run: Path) -> dict[str, bytes]:
    """Of the newest checkpoint's tensors."""
    return {path.name: path.read_bytes() for path in latest_checkpoint(run).glob("*.safetensors")}


@pytest.mark.parametrize("by", ["gradient", "loss"])
def test_a_skipped_update_leaves_weights_moments_and_average_untouched(by, tmp_path):
    train(tmp_path, 2, bad_at(2, by=by))
    before = contents(tmp_path)
    state = train(tmp_path, 3, bad_at(2, by=by))
    assert state.step == 3
    assert contents(tmp_path) == before
    train(tmp_path, 4, bad_at(2, by=by))
    after = contents(tmp_path)
    assert all(after[name] != before[name] for name in before)


def test_the_log_counts_them_and_holds_no_number_that_is_not_finite(tmp_path):
    train(tmp_path, 6, bad_at(1, 4, by="loss"))
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1, 2, 2]
    assert ["loss" in line for line in lines] == [True, False, True, True, False, True]
    assert "Infinity" not in (tmp_path / "log.jsonl").read_text()


def test_fewer_in_a_row_than_the_limit_go_on_however_many_there_are(tmp_path):
    state = train(tmp_path, 12, bad_at(0, 1, 3, 4, 6, 7, 9, 10))
    assert state.extras["nonfinite"].skipped == 8


def test_too_many_in_a_row_end_the_run_naming_the_first_bad_tensor(tmp_path):
    message = r"^step 6: .* first bad tensor: gradient of weight\. 3 steps in a row are not finite"
    with pytest.raises(FloatingPointError, match=message):
        train(tmp_path, 9, bad_at(3, 4, 5))
    assert latest_checkpoint(tmp_path).name == "step-00000005"


def test_a_gradient_is_named_that_is_itself_bad(tmp_path):
    """Not the first in order: clipping by a norm of NaN would have spoilt them all."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[1].bias.register_hook(lambda gradient: gradient * torch.nan)

    def objective(_, batch: Tensor, step: int) -> Loss:
        return Loss(model(batch).sum())

    with pytest.raises(FloatingPointError, match=r"gradient of 1\.bias"):
        Trainer(
            model,
            objective,
            lambda step: torch.ones(2, 1),
            TrainConfig(precision="fp32", max_skipped_steps=1),
            steps=1,
            seed=0,
            run_dir=tmp_path,
            meta={"kind": "two", "config": {}, "inputs": {}},
        ).train()


def test_one_ends_the_run_at_the_first(tmp_path):
    with pytest.raises(FloatingPointError, match=r"^step 4: "):
        train(tmp_path, 9, bad_at(3), max_skipped_steps=1)


@pytest.mark.parametrize("stop", [2, 3, 4, 5])
def test_stopping_and_going_on_counts_the_same(stop, tmp_path):
    """Before, between and after skipped updates; the row that ends the run goes on too."""
    objective = bad_at(2, 3, 6, 7, 8)
    train(tmp_path / "whole", 6, objective)
    train(tmp_path / "split", stop, objective)
    train(tmp_path / "split", 6, objective)
    assert contents(tmp_path / "whole") == contents(tmp_path / "split")
    metas = [(latest_checkpoint(tmp_path / name) / "meta.json").read_text() for name in ("whole", "split")]
    assert metas[0] == metas[1]
    train(tmp_path / "split", 8, objective)  # two in a row, saved
    with pytest.raises(FloatingPointError, match=r"^step 9: "):
        train(tmp_path / "split", 9, objective)


def test_the_average_takes_its_turn_only_at_updates_that_were_made(tmp_path):
    state = train(tmp_path, 6, bad_at(1, 2), ema=EMAConfig(0.9, 2))  # its turns: 2 (skipped), 4, 6
    assert state.ema.updates == 2


def test_scales_have_125_times_the_patience():
    """A scale that is too large comes down once in 125 updates (D)."""
    scaled, other = NonfiniteGuard(2), NonfiniteGuard(2)
    assert [scaled.record_skip(scaled=True) for _ in range(2 * BACKOFF_INTERVAL)] == [False] * (
        2 * BACKOFF_INTERVAL - 1
    ) + [True]
    assert [other.record_skip(scaled=False) for _ in range(2)] == [False, True]


def test_no_limit_is_refused():
    with pytest.raises(ValueError, match="max_skipped_steps must be positive"):
        TrainConfig(max_skipped_steps=0)

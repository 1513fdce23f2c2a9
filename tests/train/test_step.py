"""Steps that are not finite are skipped and counted, and end the run when too many come in a row."""

import pytest
import torch
from torch import Tensor, nn

from dalle.train.checkpoint import latest_checkpoint
from dalle.train.config import EMAConfig
from dalle.train.grad_scaler import BACKOFF_INTERVAL
from dalle.train.loggers import read_log
from dalle.train.nonfinite import NonfiniteGuard
from dalle.train.step import to_device
from dalle.types import Loss
from tests.helpers.line import fit_line, newest_files


@pytest.mark.parametrize(("device", "no_wait"), [("cuda", True), ("mps", False), ("cpu", False)])
def test_only_copies_to_cuda_do_not_wait(device, no_wait, monkeypatch):
    found = []
    monkeypatch.setattr(Tensor, "to", lambda tensor, to, non_blocking: found.append((to.type, non_blocking)))
    to_device((torch.zeros(2), [1]), torch.device(device))
    assert found == [(device, no_wait)]


def bad_at(*steps: int, by: str = "gradient"):
    """An objective whose gradient, or loss, is not finite at these steps, counted from 0."""

    def objective(model: nn.Module, batch: Tensor, step: int) -> Loss:
        out = model(batch)
        if step in steps and by == "gradient":
            out = out + (0 * out).abs().sqrt()  # 0, with a gradient of infinity times 0
        loss = (out - 2 * batch).square().mean()
        return Loss(loss + torch.inf if step in steps and by == "loss" else loss)

    return objective


def train(out, steps, objective, **changes):
    return fit_line(out, steps, objective, **{"max_skipped_steps": 3} | changes)


@pytest.mark.parametrize("by", ["gradient", "loss"])
def test_a_skipped_step_leaves_weights_moments_and_average_untouched(by, tmp_path):
    def tensors():
        contents = newest_files(tmp_path)
        return {name: data for name, data in contents.items() if name.endswith(".safetensors")}

    train(tmp_path, 2, bad_at(2, by=by))
    before = tensors()
    assert train(tmp_path, 3, bad_at(2, by=by)).step == 3
    assert tensors() == before
    train(tmp_path, 4, bad_at(2, by=by))
    assert all(tensors()[name] != before[name] for name in before)


def test_the_log_counts_them_and_holds_no_number_that_is_not_finite(tmp_path):
    train(tmp_path, 6, bad_at(1, 4, by="loss"))
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1, 2, 2]
    assert ["loss" in line for line in lines] == [True, False, True, True, False, True]
    assert "Infinity" not in (tmp_path / "log.jsonl").read_text()


def test_fewer_in_a_row_than_the_limit_do_not_end_the_run(tmp_path):
    state = train(tmp_path, 12, bad_at(0, 1, 3, 4, 6, 7, 9, 10))
    assert state.extras["nonfinite"].skipped == 8


@pytest.mark.parametrize(("bad", "limit", "last"), [((3, 4, 5), 3, 5), ((3,), 1, 3)])
def test_too_many_in_a_row_end_the_run_naming_the_first_bad_tensor(bad, limit, last, tmp_path):
    message = rf"^step {last + 1}: .*: gradient of weight\. {limit} steps in a row"
    with pytest.raises(FloatingPointError, match=message):
        train(tmp_path, 9, bad_at(*bad), max_skipped_steps=limit)
    assert latest_checkpoint(tmp_path).name == f"step-0000000{last}"


def test_a_gradient_is_named_that_is_itself_bad(tmp_path):
    """Not the first in order: clipping by a norm of NaN would have made them all so."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[1].bias.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(FloatingPointError, match=r"gradient of 1\.bias"):
        train(tmp_path, 1, bad_at(), model=model, max_skipped_steps=1)


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_stopping_and_resuming_counts_the_same(stop, tmp_path):
    """Before, between and after skipped steps; steps in a row are counted over a resume."""
    objective = bad_at(2, 3, 6, 7, 8)
    train(tmp_path / "whole", 6, objective)
    train(tmp_path / "split", stop, objective)
    train(tmp_path / "split", 6, objective)
    assert newest_files(tmp_path / "whole") == newest_files(tmp_path / "split")
    train(tmp_path / "split", 8, objective)  # two in a row, saved
    with pytest.raises(FloatingPointError, match=r"^step 9: "):
        train(tmp_path / "split", 9, objective)


def test_the_average_is_updated_only_at_steps_that_were_made(tmp_path):
    state = train(tmp_path, 6, bad_at(1, 2), ema=EMAConfig(0.9, 2))  # at 2 (skipped), 4, 6
    assert state.ema.updates == 2


def test_scales_have_125_times_the_patience_unless_the_loss_itself_is_bad():
    """A scale that is too large comes down once in 125 steps (D)."""
    for patience, loss, most in ((125, 1.0, 2 * BACKOFF_INTERVAL), (1, 1.0, 2), (125, torch.nan, 2)):
        guard, ends = NonfiniteGuard(2), []
        for _ in range(most):
            assert not guard.admit(torch.tensor(False), torch.tensor(loss), patience)
            ends.append(guard.at_end())
        assert ends == [False] * (most - 1) + [True]
        assert not guard.admit(torch.tensor(True), torch.tensor(1.0))  # nothing more, until the host looks

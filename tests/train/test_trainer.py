"""Trainer: exact resume, refused changes, bad numbers, one step, evaluation, log."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dalle.commands.encode_images import encode_images
from dalle.commands.train_clip import train_clip
from dalle.commands.train_diffusion import train_diffusion
from dalle.commands.train_dvae import train_dvae
from dalle.commands.train_transformer import train_transformer
from dalle.data import TokenCache
from dalle.hub.registry import load_model
from dalle.schedules import Schedule
from dalle.train import trainer as loop
from dalle.train.checkpoint import latest_checkpoint
from dalle.train.config import EMAConfig, OptimizerConfig
from dalle.train.loggers import FileLogger, read_log
from dalle.types import ImageTextBatch, Loss
from tests.helpers.line import (
    CONFIG,
    at_step,
    file_contents,
    fit_line,
    fresh_state,
    log_lines,
    newest_files,
    squared_error,
)
from tests.helpers.pretended_cuda import CUDA, PretendedCUDA

TRAININGS = {"dvae": train_dvae, "transformer": train_transformer, "clip": train_clip}
TRAININGS |= {"diffusion": train_diffusion}
STEPS = 7


@pytest.fixture(scope="module")
def start(tiny_runs, chain, with_inputs):
    """start(kind, out, **changes): that family's training on the inputs of `chain`."""

    def run(kind: str, out: Path, steps: int = STEPS, train: dict | None = None, **changes) -> Path:
        base = getattr(tiny_runs, kind)
        config = replace(base.train, **train or {})
        return TRAININGS[kind](with_inputs(base, chain, out=out, steps=steps, train=config, **changes))

    return run


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """whole(kind): the run of that family that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return lambda kind: folder / kind if (folder / kind).exists() else start(kind, folder / kind)


@pytest.mark.parametrize("kind", TRAININGS)
@pytest.mark.parametrize("stop", [1, pytest.param(3, marks=pytest.mark.slow), 4])
def test_stopping_and_resuming_changes_nothing(kind, stop, start, whole, tmp_path):
    """Between two updates of the EMA and on one; with an evaluation at the stop that the whole run lacks."""
    start(kind, tmp_path, steps=stop)
    start(kind, tmp_path)
    assert newest_files(tmp_path) == newest_files(whole(kind))
    assert log_lines(tmp_path) == log_lines(whole(kind))
    assert [line["step"] for line in log_lines(whole(kind))] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("kind", TRAININGS)
def test_a_run_that_dies_resumes_from_its_last_checkpoint(kind, start, whole, tmp_path, monkeypatch):
    """It dies in step 6, after the checkpoint of step 4; step 5 is repeated and logged once."""
    train_step = loop.train_step

    def dying(state, *rest):
        if state.step + 1 == 6:
            raise RuntimeError("power cut")
        return train_step(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", dying)
        with pytest.raises(RuntimeError, match="power cut"):
            start(kind, tmp_path)
    assert latest_checkpoint(tmp_path).name == "step-00000004"
    assert log_lines(tmp_path)[-1]["step"] == 5
    start(kind, tmp_path)
    assert newest_files(tmp_path) == newest_files(whole(kind))
    for evaluations in (False, True):
        assert log_lines(tmp_path, evaluations) == log_lines(whole(kind), evaluations)


def test_a_fresh_process_resumes_exactly(start, whole, chain, tiny_configs, tmp_path, python):
    start("transformer", tmp_path / "run", steps=3)
    words = ["--config", tiny_configs / "transformer" / "shapes.yaml", "--out", tmp_path / "run"]
    words += ["--steps", STEPS, "--tokens", chain / "tokens", "--text-tokenizer", chain / "text"]
    done = python(["scripts/train_transformer.py", *words], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming from step 3" in done.stdout
    assert newest_files(tmp_path / "run") == newest_files(whole("transformer"))


@pytest.mark.parametrize(
    ("kind", "muon"), [("dvae", None), ("transformer", None), ("transformer", 5.0), ("clip", 5.0)]
)
def test_resuming_is_exact_in_bf16_and_with_muon(kind, muon, start, tiny_runs, tmp_path):
    optimizer = getattr(tiny_runs, kind).train.optimizer
    train = {"optimizer": replace(optimizer, muon_lr_scale=muon)} if muon else {"precision": "bf16"}
    for name, steps in (("whole", 4), ("split", 1), ("split", 4)):
        start(kind, tmp_path / name, steps=steps, train=train)
    assert newest_files(tmp_path / "whole") == newest_files(tmp_path / "split")


def test_inputs_may_move_and_other_tokens_are_refused(tiny_runs, with_inputs, chain, tmp_path):
    """What counts is their hashes."""
    run = with_inputs(tiny_runs.transformer, chain, out=tmp_path / "run", steps=1)
    train_transformer(run)
    shutil.copytree(chain / "tokens", tmp_path / "moved")
    shutil.copy(chain / "text" / "text_tokenizer.json", tmp_path)
    moved = {"tokens": tmp_path / "moved", "text_tokenizer": tmp_path / "text_tokenizer.json"}
    train_transformer(replace(run, steps=2, **moved))
    assert latest_checkpoint(tmp_path / "run").name == "step-00000002"
    own = TokenCache(chain / "tokens")
    encode = replace(tiny_runs.encode, data=replace(tiny_runs.encode.data, shapes_seed=1))
    other = encode_images(replace(encode, dvae=chain / "dvae", out=tmp_path / "tokens"))
    with pytest.raises(ValueError, match=rf"inputs\.tokens was '{own.hash}', is '{other.hash}'"):
        train_transformer(replace(run, tokens=tmp_path / "tokens", steps=3))


def test_tokens_of_another_dvae_are_refused_with_both_hashes(tiny_runs, with_inputs, chain, tmp_path):
    train_dvae(replace(tiny_runs.dvae, out=tmp_path / "other", seed=9, steps=1))
    run = with_inputs(tiny_runs.transformer, chain, out=tmp_path / "run", steps=1)
    hashes = [load_model(path / name, "dvae").hash for path, name in ((chain, "dvae"), (tmp_path, "other"))]
    with pytest.raises(ValueError, match=f"{hashes[0]}, .*{hashes[1]}"):
        train_transformer(replace(run, dvae=tmp_path / "other"))
    train_transformer(replace(run, dvae=chain / "dvae"))


@pytest.mark.parametrize("kind", TRAININGS)
def test_evaluating_changes_nothing(kind, start, whole, tmp_path):
    start(kind, tmp_path, train={"eval_every": 1})
    assert len(log_lines(tmp_path, True)) > len(log_lines(whole(kind), True))
    files, others = newest_files(tmp_path), newest_files(whole(kind))
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert files[name] == others[name]


def test_another_seed_is_another_run(start, whole, tmp_path):
    start("dvae", tmp_path, seed=1)
    assert load_model(tmp_path, "dvae").hash != load_model(whole("dvae"), "dvae").hash


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"config": {"train": {"b": 4}}}, {"config": {"train": {"b": 8}}}, r"train\.b was 4, is 8"),
        ({"inputs": {"dvae": "aaaa"}}, {"inputs": {"dvae": "bbbb"}}, r"inputs\.dvae was 'aaaa', is 'bbbb'"),
    ],
)
def test_a_changed_configuration_resumes_only_if_allowed_and_is_noted(before, after, words, tmp_path, capsys):
    fit_line(tmp_path, steps=2, **before)
    files = file_contents(tmp_path)
    with pytest.raises(ValueError, match=rf"another configuration .*{words}.*--resume changed"):
        fit_line(tmp_path, steps=3, **after)
    assert file_contents(tmp_path) == files
    fit_line(tmp_path, steps=3, resume="changed", **after)
    assert "note: from here on with another configuration" in capsys.readouterr().out
    (noted,) = (line for line in read_log(tmp_path / "log.jsonl") if "changes" in line)
    assert noted["step"] == 2
    fit_line(tmp_path, steps=4, **after)  # it is the run's own now


def test_another_seed_kind_or_format_is_refused_and_steps_may_change(start, change_meta, tmp_path):
    start("dvae", tmp_path, steps=1)
    for kind, seed, words in (("dvae", 1, "seed was 0, is 1"), ("clip", 0, "'dvae', expected 'clip'")):
        with pytest.raises(ValueError, match=words):
            start(kind, tmp_path, seed=seed)
    start("dvae", tmp_path, steps=2)
    assert latest_checkpoint(tmp_path).name == "step-00000002"
    change_meta(latest_checkpoint(tmp_path), format=99)
    with pytest.raises(ValueError, match="format 99"):
        start("dvae", tmp_path)


def test_a_finished_run_is_left_as_it_is(tmp_path, capsys):
    fit_line(tmp_path, steps=2)
    before = latest_checkpoint(tmp_path).stat().st_mtime_ns
    assert fit_line(tmp_path, steps=2).step == 2
    assert fit_line(tmp_path, steps=1).step == 2
    assert "step 2 is done, more than --steps 1" in capsys.readouterr().out
    assert latest_checkpoint(tmp_path).stat().st_mtime_ns == before


@pytest.mark.parametrize("changes", [{"log_every": 1}, {"log_every": 9, "save_every": 2}])
def test_a_run_directory_moved_during_the_training_is_named(tmp_path, changes):
    run = tmp_path / "run"
    with pytest.raises(ValueError, match=r"run was moved or removed .*move it back"):
        fit_line(run, steps=4, objective=at_step(2, lambda: run.rename(tmp_path / "moved")), **changes)
    assert not run.exists()


def test_never_takes_a_new_directory_only(tmp_path):
    assert fit_line(tmp_path, steps=1, resume="never").step == 1
    with pytest.raises(ValueError, match="holds a run; give another --out"):
        fit_line(tmp_path, steps=2, resume="never")
    with pytest.raises(ValueError, match=r"cannot write to .*jsonl/run.*another path"):
        fit_line(tmp_path / "log.jsonl" / "run", steps=1)


def test_nan_in_pixels_is_named(start, tmp_path, monkeypatch):
    def with_nan(dataset, samples, *rest, **more):
        pixels = np.full((len(samples), 3, 32, 32), np.nan, np.float32)
        return ImageTextBatch(pixels, [["nothing"]] * len(samples), list(samples))

    monkeypatch.setattr("dalle.shapes.dataset.ShapesDataset.load", with_nan)
    with pytest.raises(ValueError, match="pixels hold NaN"):
        start("dvae", tmp_path)


class Overflow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.inf


def infinite_at_two(model: nn.Module, batch: Tensor, step: int) -> Loss:
    return Loss(model(batch).sum() + (torch.inf if step == 2 else 0.0))


def nan_weight_at_two(model: nn.Module, batch: Tensor, step: int) -> Loss:
    if step == 2:
        model[0].bias.data.fill_(torch.nan)
    return squared_error(model, batch, step)


@pytest.mark.parametrize(
    ("objective", "layers", "words"),
    [
        (squared_error, [nn.Linear(1, 1), Overflow(), nn.Linear(1, 1)], "step 1: .*output of 1"),
        (infinite_at_two, [nn.Linear(1, 1)], "step 3: .*the loss itself"),
        (nan_weight_at_two, [nn.Linear(1, 1)], r"step 3: .*parameter 0\.bias"),
    ],
)
def test_the_first_bad_tensor_is_named_and_the_update_not_made(objective, layers, words, tmp_path):
    model = nn.Sequential(*layers)
    with pytest.raises(FloatingPointError, match=words):
        fit_line(tmp_path, steps=5, objective=objective, model=model)
    assert model[0].weight.isfinite().all()


def test_clipping_bounds_the_gradient_and_the_norm_is_that_before_it():
    norms, gradients = [], []
    for limit in (None, 0.5):
        torch.manual_seed(0)
        state, optim = fresh_state(), replace(CONFIG.optimizer, max_grad_norm=limit)
        _, norm = loop.train_step(state, torch.full((4, 1), 100.0), squared_error, optim, "fp32", 0)
        norms.append(float(norm))
        gradients.append(float(torch.cat([p.grad.flatten() for p in state.model.parameters()]).norm()))
    assert norms[0] == pytest.approx(norms[1])
    assert gradients == [pytest.approx(norms[0]), pytest.approx(0.5, rel=1e-4)]
    assert norms[0] > 100


def test_the_learning_rate_follows_its_schedule(tmp_path):
    optimizer = OptimizerConfig(lr=Schedule(1.0, 0.0, 4, "linear"), warmup_steps=2)
    fit_line(tmp_path, steps=5, optimizer=optimizer)
    assert [line["lr"] for line in log_lines(tmp_path)] == pytest.approx([0.5, 0.75, 0.5, 0.25, 0.0])


def test_evaluation_sees_the_averaged_weights_in_eval_mode_and_training_its_own(tmp_path):
    evaluated, trained, model = [], [], nn.Linear(1, 1)

    def evaluate(model, step):
        evaluated.append((model.training, torch.is_grad_enabled(), model.weight.item()))
        return {"weight": model.weight.item()}

    def objective(model, batch, step):
        trained.append((model.training, model.weight.item()))
        return squared_error(model, batch, step)

    changes = {"eval_every": 1, "ema": EMAConfig(0.5, 1)}
    fit_line(tmp_path, 3, objective, model, evaluate=evaluate, **changes)
    weights = [weight for _, weight in trained[1:]] + [model.weight.item()]  # after steps 1, 2, 3
    assert [entry[:2] for entry in evaluated] == [(False, False)] * 3
    assert all(training for training, _ in trained)
    assert evaluated[0][2] == pytest.approx(weights[0])
    assert evaluated[2][2] == pytest.approx((weights[2] * 4 + weights[1] * 2 + weights[0]) / 7)


def test_evaluation_uses_the_same_random_numbers_each_time(tmp_path):
    fit_line(tmp_path, 2, evaluate=lambda model, step: {"noise": torch.rand(())}, eval_every=1)
    first, second = log_lines(tmp_path, evaluations=True)
    assert first["val/noise"] == second["val/noise"]


def test_an_evaluation_restores_the_random_numbers_of_its_own_gpu_alone(tmp_path, monkeypatch):
    """Of the eight that there are."""
    kept = []
    with PretendedCUDA(), monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "device_count", lambda: 8)
        patched.setattr(torch.cuda, "get_rng_state", kept.append)
        fit_line(tmp_path, 1, model=nn.Linear(1, 1).to("cuda"), evaluate=lambda model, step: {})
    assert kept == [CUDA]


@pytest.mark.parametrize(("step", "kept"), [(0, []), (2, [1, 2])])
def test_opening_a_log_drops_later_steps_and_a_broken_last_line(step, kept, tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4')
    FileLogger(tmp_path, step).write(9, {"loss": 1.5})
    assert [line["step"] for line in read_log(file)] == [*kept, 9]

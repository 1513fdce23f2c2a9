"""Loggers and throughput: rates, TensorBoard, W&B, images."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dalle.commands.train_transformer import train_transformer
from dalle.train import loggers
from dalle.train.loggers import LogConfig, Loggers, ThroughputMeter, peak_flops, read_log
from dalle.types import Loss, StepCost
from tests.helpers.line import fit_line, squared_error

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds) advances the clock."""
    now = [100.0]
    monkeypatch.setattr(loggers, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_rates_are_over_all_updates_since_the_last_line(clock):
    """Without evaluations and checkpoints."""
    meter, cost = ThroughputMeter(CPU, peak=1000.0), StepCost(samples=4, tokens=40, flops=800.0)
    for waited, computed in [(1.0, 3.0), (3.0, 1.0)]:
        with meter.timed("waiting"):
            clock(waited)
        clock(computed)
        meter.steps += 1
        with meter.timed("paused"):
            clock(50.0)
    lap = meter.lap(cost)
    assert lap.pop("max_memory_gib") > 0
    rates = {"samples_per_sec": 1.0, "tokens_per_sec": 10.0, "mfu": 0.2}
    assert lap == {"step_time": 4.0, "data_time_frac": 0.5, **rates}
    clock(2.0)
    meter.steps += 1
    assert meter.lap(cost)["samples_per_sec"] == 2.0


@pytest.mark.parametrize(
    ("peak", "cost", "more"),
    [
        (None, StepCost(4, 0, 100.0), {"samples_per_sec"}),
        (1e3, StepCost(4), {"samples_per_sec"}),
        (1e3, StepCost(0), set()),
    ],
)
def test_unknown_rates_are_left_out(peak, cost, more):
    """No tokens for images, no MFU without a peak or FLOPs, no rates without a cost."""
    lap = ThroughputMeter(CPU, peak=peak).lap(cost)
    assert lap.keys() == {"step_time", "data_time_frac", "max_memory_gib"} | more


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L400 of the future", None),
    ],
)
def test_gpus_are_known_by_name_in_16_bit_only_and_a_cpu_if_told(name, flops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), "bf16") == flops
    assert peak_flops(torch.device("cuda"), "fp32") is peak_flops(CPU, "bf16") is None
    assert peak_flops(CPU, "fp32", 1e12) == 1e12


META = {"kind": "line", "config": {"train": {"batch_size": 4}}, "inputs": {}}


def objective(model: nn.Module, batch: Tensor, step: int) -> Loss:
    """A line's, with a cost and a baseline."""
    return squared_error(model, batch, step)


objective.step_cost = lambda model, batch: StepCost(len(batch), 2 * len(batch), 6.0 * len(batch))
objective.random_baseline = lambda model: {"loss": 7.5}


def evaluate(model: nn.Module, step: int) -> dict[str, Any]:
    """The weight, and a gray image as bright."""
    gray = int(50 * float(model.weight.abs()))
    return {"weight": model.weight.detach(), "gray": Image.new("RGB", (8, 4), (gray,) * 3)}


def train(out: Path, steps: int = 4, **log: Any) -> list[dict]:
    """A line, evaluated every second step."""
    changes = {"log": LogConfig(**log), "eval_every": 2, "save_every": 2}
    fit_line(out, steps, objective, config=META["config"], evaluate=evaluate, **changes)
    return read_log(out / "log.jsonl")


def test_the_log_has_rates_chance_once_and_evaluations(tmp_path):
    lines = train(tmp_path, peak_flops=1e9)
    trained = [line for line in lines if "loss" in line]
    assert [line.get("baseline/loss") for line in trained] == [7.5, None, None, None]
    names = "grad_norm lr skipped_steps lr_reductions step_time data_time_frac max_memory_gib"
    assert set(names.split()) < set(trained[2])
    for line in trained:
        assert line["tokens_per_sec"] == pytest.approx(2 * line["samples_per_sec"])
        assert line["mfu"] == pytest.approx(6 * line["samples_per_sec"] / 1e9)
        assert 0 <= line["data_time_frac"] <= 1
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["gray-00000002.png", "gray-00000004.png"]
    assert [line.keys() for line in lines if "val/weight" in line] == [{"step", "val/weight"}] * 2


def events(run: Path):
    """What TensorBoard reads from a run."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    return found.Reload()


def test_tensorboard_reads_the_same_numbers_and_images(tmp_path):
    pytest.importorskip("tensorboard")
    lines = train(tmp_path, loggers=("tensorboard",))
    found = events(tmp_path)
    for name in ("loss", "grad_norm", "val/weight"):
        written = [(line["step"], pytest.approx(line[name])) for line in lines if name in line]
        assert [(point.step, point.value) for point in found.Scalars(name)] == written
    assert [point.value for point in found.Scalars("baseline/loss")] == [7.5]
    assert [image.step for image in found.Images("gray")] == [2, 4]


def test_tensorboard_after_a_crash_shows_each_step_once(tmp_path):
    """Steps 3 and 4 are made twice: the first time they are after the last checkpoint."""
    pytest.importorskip("tensorboard")
    for start, steps, offset in ((0, (1, 2, 3, 4), 0.0), (2, (3, 4, 5), 10.0)):
        logger = Loggers(tmp_path, start, LogConfig(loggers=("tensorboard",)), META, True)
        for step in steps:
            logger.write(step, {"loss": offset + step, "changes": ["a was 1, is 2"]})
        logger.close()
    points = [(point.step, point.value) for point in events(tmp_path).Scalars("loss")]
    assert points == [(1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0), (5, 15.0)]


@pytest.fixture
def wandb(monkeypatch):
    stub = MagicMock(Image=lambda image: ("image", image.size))
    stub.api.api_key = None
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return stub


def test_wandb_is_offline_unless_logged_in_and_gets_all(wandb, tmp_path):
    train(tmp_path / "line", loggers=("wandb",), project="lines")
    words, run = wandb.init.call_args.kwargs, wandb.init.return_value
    assert words["mode"] == "offline"
    assert (words["project"], words["name"], words["dir"]) == ("lines", "line", str(tmp_path / "line"))
    assert words["config"] == META["config"]
    assert [call.kwargs["step"] for call in run.log.mock_calls if "loss" in call.args[0]] == [1, 2, 3, 4]
    run.log.assert_any_call({"gray": ("image", (8, 4))}, step=2)
    run.finish.assert_called_once()


def test_wandb_keeps_its_id_and_its_own_settings_when_logged_in(wandb, tmp_path, monkeypatch):
    wandb.api.api_key = "known"
    for steps in (1, 2):
        train(tmp_path / "one", steps, loggers=("wandb",))
    wandb.api.api_key = None
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train(tmp_path / "two", 1, loggers=("wandb",))
    words = [call.kwargs for call in wandb.init.call_args_list]
    assert [each["mode"] for each in words] == [None] * 3
    assert words[0]["id"] == words[1]["id"] != words[2]["id"]


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_named_and_needed_only_if_asked_for(name, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    train(tmp_path, 1)
    with pytest.raises(ImportError, match=rf"no {name}: .*zeroshot-text2image\[{name}\]"):
        train(tmp_path, 1, loggers=(name,))


def test_the_transformer_samples_held_out_captions_with_its_dvae(chain, tiny_runs, with_inputs, tmp_path):
    changes = {"with": {"sample_grid_size": 3}, "without": {"dvae": None}, "none": {"sample_grid_size": 0}}
    run = with_inputs(tiny_runs.transformer, chain, dvae=chain / "dvae")
    for name, change in changes.items():
        train_transformer(replace(run, out=tmp_path / name, **change))
    (sheet,) = (tmp_path / "with").glob("samples-*.png")
    assert sheet.name == "samples-00000002.png"
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape[1] > 3 * 160
    assert pixels.std() > 5
    assert not list((tmp_path / "without").glob("*.png")) + list((tmp_path / "none").glob("*.png"))
    lines = [read_log(tmp_path / name / "log.jsonl")[-1] for name in ("with", "without")]
    assert lines[0] == lines[1]  # sampling changes no score, and so no random number


def test_the_first_loss_of_the_transformer_is_chance(chain):
    """Its output matrix starts at 0: an even guess over ln(vocabulary)."""
    first = read_log(chain / "transformer" / "log.jsonl")[0]
    for name in ("loss", "text_loss", "image_loss"):
        assert first[name] == pytest.approx(first[f"baseline/{name}"], rel=1e-5)
    assert first["baseline/image_loss"] == pytest.approx(np.log(16))


def test_clip_shows_what_it_finds(chain):
    (sheet,) = (chain / "clip").glob("retrieval-*.png")
    assert np.asarray(Image.open(sheet)).std() > 5


@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b"null\n", b"3\n", b'{"loss": 1}\n', b"\xff\x00\n"])
def test_a_damaged_line_of_a_log_costs_one_line(tmp_path, tail):
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"step": 1, "loss": 2.0}\n' + tail.rstrip() + b'\n\0\0{"step": 2}\n')
    assert read_log(file) == [{"step": 1, "loss": 2.0}, {"step": 2}]


def test_other_loggers_get_least_and_largest_of_a_list(wandb, tmp_path):
    logger = Loggers(tmp_path, 0, LogConfig(loggers=("wandb",)), META, True)
    logger.write(1, {"loss": 1.0, "scales": [13.0, 12.0, 20.0], "changes": ["a was 1, is 2"]})
    plain = {"loss": 1.0, "scales/min": 12.0, "scales/max": 20.0}
    wandb.init.return_value.log.assert_called_once_with(plain, step=1)
    assert read_log(tmp_path / "log.jsonl")[0]["scales"] == [13.0, 12.0, 20.0]

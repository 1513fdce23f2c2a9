"""Gradients that underflow with one scale and train with one per resblock (section 2.4): dalle/stages/underflow.py."""

import json

import pytest
import torch
from torch import nn

from dalle.nn.blocks import Resblock
from dalle.stages.underflow import Experiment, OneScale, UnderflowExperiment, emulate_half, run_underflow


def test_half_precision_is_emulated_where_figure_4_has_it():
    """Inputs, outputs, their gradients and the matrix's gradient are fp16 numbers; below 2^-25 nothing is left."""
    block = Resblock(4, nn.Sequential(nn.Linear(4, 4)))
    emulate_half(block)
    x = torch.randn(3, 4, requires_grad=True)
    out = block(x)
    (gradient,) = torch.autograd.grad(out.sum() * 1.001, block.f[0].weight, retain_graph=True)
    for tensor in (out, gradient):
        assert torch.equal(tensor, tensor.half().float())
    (gone,) = torch.autograd.grad(out.sum() * 2.0**-26, x, retain_graph=True)
    assert not gone.any()
    (kept,) = torch.autograd.grad(out.sum() * 2.0**-10, x)
    assert kept.any()


def test_one_scale_follows_the_rules_of_the_usual_scaler():
    scale = OneScale(nn.Linear(2, 2))
    theirs = torch.amp.GradScaler("cpu")
    assert scale.values.item() == theirs.get_scale() == 2.0**16
    scale.update(torch.tensor([False]))
    assert scale.values.item() == 2.0**16 * theirs.get_backoff_factor()
    for _ in range(theirs.get_growth_interval() - 1):
        scale.update(torch.tensor([True]))
    assert scale.values.item() == 2.0**15
    scale.update(torch.tensor([True]))
    assert scale.values.item() == 2.0**15 * theirs.get_growth_factor()


@pytest.fixture(scope="module")
def runs():
    """What each way of scaling makes of the same forty updates."""
    lines = {}
    for name in ("fp32", "one scale", "scale per resblock"):
        experiment = Experiment(UnderflowExperiment(), name)
        lines[name] = [experiment.step() for _ in range(40)]
    return lines


def test_with_one_scale_the_gradients_of_late_resblocks_are_zero(runs):
    shares = runs["one scale"][0]["zero_share"]
    assert min(shares[-10:]) > 0.9
    assert shares[0] < 0.5


def test_with_a_scale_per_resblock_no_resblock_is_dead(runs):
    assert max(runs["scale per resblock"][0]["zero_share"]) < 0.5
    scales = runs["scale per resblock"][0]["log2_scales"]
    assert max(scales) - min(scales) > 8


def test_the_loss_falls_with_a_scale_per_resblock_and_stays_with_one(runs):
    fall = {name: lines[0]["nats"] - lines[-1]["nats"] for name, lines in runs.items()}
    assert fall["scale per resblock"] > 0.5 * fall["fp32"]
    assert fall["one scale"] < 0.25 * fall["fp32"]


def test_the_command_writes_report_logs_and_pictures(tmp_path):
    run_underflow(UnderflowExperiment(out=tmp_path, steps=2, streams=2))
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["final_nats"]) == {"fp32", "one scale", "scale per resblock"}
    for name in ("underflow.png", "figure12.png"):
        assert 1_000 < (tmp_path / name).stat().st_size < 150_000


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="must be positive"):
        UnderflowExperiment(steps=0)

"""Optimizers: AdamW's groups, Muon, clipped second moment, halvings of the learning rate (B.2), 8 bits."""

import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from dalle.commands.train_clip import CLIP_TRAINING
from dalle.commands.train_dvae import PAPER_TRAINING
from dalle.hub.registry import build_model
from dalle.schedules import Schedule
from dalle.train.checkpoint import restore
from dalle.train.config import NO_PLATEAU, EMAConfig, OptimizerConfig, PlateauConfig
from dalle.train.loggers import read_log
from dalle.train.optimizer import (
    ReduceLROnPlateau,
    _changing,
    build_optimizers,
    decay_groups,
    init_8bit_moments,
    set_lr,
)
from dalle.train.state import EMA, TrainState
from dalle.train.step import train_step
from dalle.types import Loss
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.line import CONFIG, fit_line, newest_files


@pytest.fixture(params=["dvae", "transformer", "clip"])
def model(request: pytest.FixtureRequest, tiny_runs: SimpleNamespace) -> nn.Module:
    return build_model(request.param, getattr(tiny_runs, request.param).model)


def names(group) -> set[str]:
    return {name for name, _ in group}


def test_matrices_and_convolutions_decay_and_gains_biases_and_embeddings_do_not(model):
    decay, keep = map(names, decay_groups(model))
    assert decay | keep == {name for name, _ in model.named_parameters()}
    assert not decay & keep
    weights = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    weights |= {name for name, p in model.named_parameters() if p.ndim == 4}
    embeddings = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    vectors = {name for name, p in model.named_parameters() if p.ndim < 2}
    assert set() < weights <= decay
    assert set() < vectors | embeddings <= keep


def test_the_position_and_class_embeddings_of_clip_do_not_decay(tiny_runs):
    """They are bare parameters: one is a matrix by its shape, though none by its use."""
    embeddings = {"net.visual.positional_embedding", "net.visual.class_embedding", "net.positional_embedding"}
    kept = names(decay_groups(build_model("clip", tiny_runs.clip.model))[1])
    assert embeddings | {"net.token_embedding.weight", "net.logit_scale"} <= kept


def test_decay_shrinks_matrices_by_learning_rate_times_decay_and_leaves_the_rest():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (optimizer,) = build_optimizers(model, replace(CONFIG.optimizer, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    expected = before | {"1.weight": before["1.weight"] * (1 - 0.1 * 0.5)}
    torch.testing.assert_close(dict(model.named_parameters()), expected)


def test_the_settings_reach_adamw_and_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    (optimizer,) = build_optimizers(model, OptimizerConfig())
    matrix, vector = optimizer.param_groups
    assert (matrix["betas"], matrix["eps"], matrix["weight_decay"]) == ((0.9, 0.96), 1e-8, 4.5e-2)
    assert vector["weight_decay"] == 0
    assert matrix["params"] + vector["params"] == list(model[1].parameters())


def stack() -> nn.Module:
    """An embedding, two layers of a matrix, a bias and a gain, and an output."""
    layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)) for _ in range(2))
    parts = {"embedding": nn.Embedding(5, 6), "layers": layers, "output": nn.Linear(6, 5)}
    return nn.Sequential(OrderedDict(parts))


def test_muon_has_the_matrices_of_the_layers_and_adamw_the_rest():
    """The paper has no Muon."""
    model, matrices = stack(), {"layers.0.1.weight", "layers.1.1.weight"}
    muon, adamw = build_optimizers(model, OptimizerConfig(muon_lr_scale=5.0))
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p] for p in muon.param_groups[0]["params"]} == matrices
    rest = [names[p] for group in adamw.param_groups for p in group["params"]]
    assert sorted(rest) == sorted(set(names.values()) - matrices)
    (only,) = build_optimizers(model, OptimizerConfig())
    assert isinstance(only, torch.optim.AdamW)
    with pytest.raises(ValueError, match="Linear has no stack of layers for Muon"):
        build_optimizers(nn.Linear(2, 2), OptimizerConfig(muon_lr_scale=5.0))


def test_an_update_of_muon_has_equal_singular_values():
    """About 0.7 to 1.2 after five Newton-Schulz steps, whatever the gradient's are; directions are kept."""
    model = stack()
    weight = model.layers[0][1].weight
    before = weight.detach().clone()
    config = replace(CONFIG.optimizer, weight_decay=0.0, muon_lr_scale=2.0)
    muon, _ = build_optimizers(model, config)
    weight.grad = torch.diag(torch.tensor([1.0, 0.8, 0.5, 0.3, 0.2, 0.1]))
    model.layers[1][1].weight.grad = torch.zeros(6, 6)
    muon.step()
    update = (before - weight.detach()) / 0.2  # learning rate 0.1, twice
    assert torch.linalg.svdvals(update).min() > 0.6
    assert torch.linalg.svdvals(update).max() < 1.3
    assert (update - torch.diag(update.diagonal())).abs().max() < 0.02


def test_the_learning_rate_of_muon_follows_that_of_adamw():
    config = OptimizerConfig(lr=Schedule(0.1, 0.0, 10, "linear"), warmup_steps=2, muon_lr_scale=5.0)
    muon, adamw = optimizers = build_optimizers(stack(), config)
    for step in (0, 1, 5):
        set_lr(optimizers, config, step)
        assert {group["lr"] for group in adamw.param_groups} == {config.lr_at(step)}
        assert muon.param_groups[0]["lr"] == pytest.approx(5 * config.lr_at(step))


@pytest.mark.parametrize("limit", [5.0, 1.0, None])
def test_the_variance_is_clipped_before_parameter_and_moment_see_it(limit):
    """Gradients up to 4, as clipping their norm leaves: the first values reach the limit, the last never."""
    optim = replace(CONFIG.optimizer, weight_decay=0.0, max_variance=limit)
    layer = nn.Linear(4, 1, bias=False).double()
    (optimizer,) = build_optimizers(layer, optim)
    weight = layer.weight.detach().clone()
    mean, variance = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 81):
        gradient = torch.tensor([[4.0, -4.0, 2.0, 0.1]], dtype=torch.float64) * (-1) ** (step // 7)
        layer.weight.grad = gradient.clone()
        optimizer.step()
        mean = optim.beta1 * mean + (1 - optim.beta1) * gradient  # AdamW by hand
        variance = optim.beta2 * variance + (1 - optim.beta2) * gradient.square()
        variance = variance.clamp(max=limit or torch.inf)
        root = (variance / (1 - optim.beta2**step)).sqrt()
        weight -= 0.1 * mean / (1 - optim.beta1**step) / (root + optim.eps)
    torch.testing.assert_close(layer.weight.detach(), weight)
    torch.testing.assert_close(optimizer.state[layer.weight]["exp_avg_sq"], variance)
    assert (variance > 5 + 1e-9).tolist() == [[limit is None] * 2 + [False] * 2]


def test_a_gradient_beyond_all_bounds_leaves_the_variance_finite_and_positive():
    layer = nn.Linear(1, 1, bias=False)
    (optimizer,) = build_optimizers(layer, replace(CONFIG.optimizer, max_grad_norm=None))
    for gradient in (1.0, 1e10, 1.0, 0.0, 0.0):
        layer.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        variance = optimizer.state[layer.weight]["exp_avg_sq"]
        assert torch.isfinite(layer.weight).all()
        assert (variance >= 0).all()
    assert float(variance) <= 5


def test_the_dvae_and_clip_have_no_bound_and_no_plateau_of_their_papers():
    configs = (PAPER_TRAINING.optimizer, CLIP_TRAINING.optimizer, OptimizerConfig())
    assert [config.max_variance for config in configs] == [None, None, 5]
    assert [config.plateau.max_reductions for config in configs] == [0, 0, 5]


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
        ([0.5, 1.5] * 15, {"window": 2, "patience": 3, "max_reductions": 3}, [8, 14, 20]),  # noise
        ([3.0, 3.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0], {"window": 1, "patience": 3}, [9]),  # falls late
        # gains below `threshold` add up, since the best reading stands until it is beaten by as much
        ([1 - 0.004 * i for i in range(100)], {"window": 1, "patience": 4, "threshold": 0.01}, []),
        ([1 - 0.002 * i for i in range(10)], {"window": 1, "patience": 4, "threshold": 0.01}, [5]),
    ],
)
def test_a_plateau_halves_when_patience_runs_out(losses, settings, halved):
    """At these updates, counted from 1."""
    plateau, reductions = ReduceLROnPlateau(PlateauConfig(**settings)), [0]
    for loss in losses:
        plateau.step(loss)
        reductions.append(plateau.reductions)
    assert [i for i in range(1, len(reductions)) if reductions[i] > reductions[i - 1]] == halved


def flat(model: nn.Module, batch: Tensor, step: int) -> Loss:
    """1, whatever the weights, with a gradient."""
    out = model(batch).sum()
    return Loss(1 + out - out.detach())


def train_flat(out: Path, steps: int, plateau: PlateauConfig) -> list[float]:
    """The learning rates of a run on `flat`."""
    fit_line(out, steps, flat, optimizer=replace(CONFIG.optimizer, plateau=plateau))
    return [line["lr"] for line in read_log(out / "log.jsonl")]


SHORT = PlateauConfig(max_reductions=2, window=2, patience=1)


def test_the_step_size_of_the_next_update_is_the_halved_one(tmp_path):
    """Readings after 2 (the best), 4 and 6 (halved)."""
    assert train_flat(tmp_path, 8, SHORT) == pytest.approx([0.1] * 4 + [0.05] * 2 + [0.025] * 2)
    assert [line["lr_reductions"] for line in read_log(tmp_path / "log.jsonl")] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert train_flat(tmp_path / "none", 8, NO_PLATEAU) == pytest.approx([0.1] * 8)


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_stopping_and_going_on_halves_at_the_same_update(stop, tmp_path):
    """In the middle of a reading, after one, and after a halving."""
    whole = train_flat(tmp_path / "whole", 8, SHORT)
    train_flat(tmp_path / "split", stop, SHORT)
    assert b"Infinity" not in newest_files(tmp_path / "split")["meta.json"]
    assert train_flat(tmp_path / "split", 8, SHORT) == whole
    assert newest_files(tmp_path / "split") == newest_files(tmp_path / "whole")


# Moments in 8 bits by torchao, not compiled.

SETTINGS = {"lr": Schedule(1e-2, 1e-2), "warmup_steps": 0, "max_variance": None}
IN_8BIT = OptimizerConfig(**SETTINGS, state_dtype="8bit")
IN_FP32 = OptimizerConfig(**SETTINGS)


def test_a_missing_torchao_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ImportError, match=r"zeroshot-text2image\[lowbit\]"):
        build_optimizers(nn.Linear(64, 64), IN_8BIT)


def net_loss(model: nn.Module, batch: torch.Tensor, step: int) -> Loss:
    return Loss((model(batch)[:, 0] - batch / 64).square().mean())


def fresh(optim: OptimizerConfig = IN_8BIT) -> TrainState:
    """A matrix of 4,096 values, one of fewer, an embedding and biases."""
    torch.manual_seed(0)
    layers = {"embedding": nn.Embedding(64, 64), "large": nn.Linear(64, 64), "relu": nn.ReLU()}
    model = nn.Sequential(OrderedDict(layers | {"small": nn.Linear(64, 1)}))
    return TrainState(model, build_optimizers(model, optim), EMA(model, EMAConfig()))


def train_net(state: TrainState, steps: int, optim: OptimizerConfig = IN_8BIT) -> list[float]:
    batches = [torch.arange(64)[(7 * (state.step + i)) % 32 :] for i in range(steps)]
    return [
        float(train_step(state, batch, net_loss, optim, "fp32", 0)[0].total.detach()) for batch in batches
    ]


@pytest.mark.slow  # importing torchao takes longer than the tests
class TestIn8Bit:
    @pytest.fixture(autouse=True)
    def _eager(self):
        pytest.importorskip("torchao.optim", reason="needs torchao, the extra lowbit")
        with torch.compiler.set_stance("force_eager"):
            yield

    def test_large_matrices_have_8_bits_and_the_rest_fp32(self):
        state = fresh()
        train_net(state, 1)
        kept = {name: tensor.dtype for name, tensor in state.state_dict()[0]["optimizer"].items()}
        assert kept["large.weight/exp_avg.codes"] == kept["large.weight/exp_avg_sq.codes"] == torch.uint8
        for name in ("embedding.weight", "large.bias", "small.weight", "small.bias"):
            assert kept[f"{name}/exp_avg"] == kept[f"{name}/exp_avg_sq"] == torch.float32

    def test_nothing_that_a_step_changes_is_on_another_device_than_its_parameter(self):
        """Else the host waits for the device to skip a step."""
        model = nn.Linear(64, 64, device="meta")
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        for optimizer in build_optimizers(model, IN_8BIT)[:1]:
            init_8bit_moments(optimizer)
            changing = _changing(optimizer)
            assert {name.partition(".")[0] for _, name in changing} == {"", "step", "exp_avg", "exp_avg_sq"}
            assert all(tensor.is_meta for tensor in changing.values())

    def test_it_learns_as_fp32_does(self):
        low, full = (train_net(fresh(optim), 60, optim) for optim in (IN_8BIT, IN_FP32))
        assert low[0] == full[0]
        assert low[-1] < 0.05 * low[0]
        assert low != full

    def test_the_learning_rate_follows_the_schedule(self):
        optim = OptimizerConfig(**SETTINGS | {"lr": Schedule(1.0, 0.0, 4, "linear")}, state_dtype="8bit")
        state = fresh(optim)
        for rate in (1.0, 0.75, 0.5):
            train_net(state, 1, optim)
            assert [float(group["lr"]) for o in state.optimizers for group in o.param_groups] == [rate] * 2

    def test_resuming_is_exact(self, tmp_path):
        whole, first, second = fresh(), fresh(), fresh()
        train_net(whole, 6)
        train_net(first, 3)
        restore(save_checkpoint(tmp_path, first, {"kind": "net"}), second)
        train_net(second, 3)
        torch.testing.assert_close(whole.state_dict()[0], second.state_dict()[0], rtol=0, atol=0)

    def test_moments_of_fp32_are_rounded_and_the_other_way_is_refused(self, tmp_path):
        fp32, low = fresh(IN_FP32), fresh()
        train_net(fp32, 3, IN_FP32)
        low.load(*fp32.state_dict(), tmp_path)
        expected = fp32.optimizers[0].state[fp32.model.large.weight]["exp_avg"]
        kept = low.optimizers[0].state[low.model.large.weight]["exp_avg"]
        torch.testing.assert_close(kept.dequantize(), expected, rtol=0, atol=float(expected.abs().max()) / 50)
        train_net(low, 1)
        with pytest.raises(ValueError, match=r"set optimizer\.state_dtype to 8bit"):
            fresh(IN_FP32).load(*low.state_dict(), tmp_path)

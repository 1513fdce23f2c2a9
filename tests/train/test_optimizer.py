"""Optimizers: AdamW's groups, Muon, and the clipped second moment (appendix B.2)."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from dalle.commands.train_clip import CLIP_TRAINING
from dalle.commands.train_dvae import PAPER_TRAINING
from dalle.hub.registry import build_model
from dalle.schedules import Schedule
from dalle.train.config import OptimizerConfig
from dalle.train.optimizer import build_optimizers, decay_groups, hidden_matrices, set_lr


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
    assert weights
    assert weights <= decay
    embeddings = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    vectors = {name for name, p in model.named_parameters() if p.ndim < 2}
    assert vectors
    assert vectors | embeddings <= keep


def test_the_position_and_class_embeddings_of_clip_do_not_decay(tiny_runs):
    """They are bare parameters: one is a matrix by its shape, though none by its use."""
    embeddings = {"net.visual.positional_embedding", "net.visual.class_embedding", "net.positional_embedding"}
    kept = names(decay_groups(build_model("clip", tiny_runs.clip.model))[1])
    assert embeddings | {"net.token_embedding.weight", "net.logit_scale"} <= kept


def test_decay_shrinks_matrices_by_learning_rate_times_decay_and_leaves_the_rest():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (optimizer,) = build_optimizers(
        model, OptimizerConfig(lr=Schedule(0.1, 0.1), warmup_steps=0, weight_decay=0.5)
    )
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    after = dict(model.named_parameters())
    torch.testing.assert_close(after["1.weight"], before["1.weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(after["1.bias"], before["1.bias"])
    assert torch.equal(after["0.weight"], before["0.weight"])


def test_the_settings_reach_adamw():
    (optimizer,) = build_optimizers(nn.Linear(2, 2), OptimizerConfig())
    matrix, vector = optimizer.param_groups
    assert (matrix["betas"], matrix["eps"], matrix["weight_decay"]) == ((0.9, 0.96), 1e-8, 4.5e-2)
    assert vector["weight_decay"] == 0


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    held = [
        p for group in build_optimizers(model, OptimizerConfig())[0].param_groups for p in group["params"]
    ]
    assert len(held) == 2
    assert all(p.requires_grad for p in held)


class Stack(nn.Module):
    """An embedding, two layers of a matrix, a bias and a gain, and an output."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)) for _ in range(2))
        self.output = nn.Linear(6, 5)


def test_the_paper_has_no_muon():
    assert OptimizerConfig().muon_lr_scale is None
    (only,) = build_optimizers(Stack(), OptimizerConfig())
    assert isinstance(only, torch.optim.AdamW)


def test_muon_has_the_matrices_of_the_layers_and_adamw_the_rest():
    model = Stack()
    muon, adamw = build_optimizers(model, OptimizerConfig(muon_lr_scale=5.0))
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p] for p in muon.param_groups[0]["params"]} == {"layers.0.1.weight", "layers.1.1.weight"}
    rest = [names[p] for group in adamw.param_groups for p in group["params"]]
    assert sorted(rest) == sorted(set(names.values()) - {"layers.0.1.weight", "layers.1.1.weight"})


def test_muon_takes_every_matrix_of_the_transformers_layers(tiny_runs):
    model = build_model("transformer", tiny_runs.transformer.model)
    expected = {n for n, p in model.named_parameters() if n.startswith("layers.") and p.ndim == 2}
    assert names(hidden_matrices(model)) == expected
    assert len(expected) == 4 * tiny_runs.transformer.model.depth  # qkv, out, expand, project


def test_an_update_of_muon_has_equal_singular_values():
    """Up to the about 0.7 to 1.2 of five Newton-Schulz steps, whatever the gradient's are; its directions are
    kept."""
    model = Stack()
    weight = model.layers[0][1].weight
    before = weight.detach().clone()
    gradient = torch.diag(torch.tensor([1.0, 0.8, 0.5, 0.3, 0.2, 0.1]))
    config = OptimizerConfig(lr=Schedule(0.1, 0.1), warmup_steps=0, weight_decay=0.0, muon_lr_scale=2.0)
    muon, _ = build_optimizers(model, config)
    weight.grad = gradient
    model.layers[1][1].weight.grad = torch.zeros(6, 6)
    muon.step()
    update = (before - weight.detach()) / 0.2  # learning rate 0.1, twice
    assert torch.linalg.svdvals(update).min() > 0.6
    assert torch.linalg.svdvals(update).max() < 1.3
    assert (update - torch.diag(update.diagonal())).abs().max() < 0.02


def test_the_learning_rate_of_muon_follows_that_of_adamw():
    config = OptimizerConfig(lr=Schedule(0.1, 0.0, 10, "linear"), warmup_steps=2, muon_lr_scale=5.0)
    muon, adamw = optimizers = build_optimizers(Stack(), config)
    for step in (0, 1, 5):
        set_lr(optimizers, config, step)
        assert {group["lr"] for group in adamw.param_groups} == {config.lr_at(step)}
        assert muon.param_groups[0]["lr"] == pytest.approx(5 * config.lr_at(step))


def test_a_model_without_layers_refuses_muon():
    with pytest.raises(ValueError, match="Linear has no stack of layers for Muon"):
        build_optimizers(nn.Linear(2, 2), OptimizerConfig(muon_lr_scale=5.0))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"muon_lr_scale": 0.0}, "muon_lr_scale must be positive"),
        ({"muon_lr_scale": float("nan")}, "muon_lr_scale must be positive"),
        ({"warmup_steps": -5}, "cannot be negative"),
        ({"lr": Schedule(-1.0, 0.1)}, "cannot be negative"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be positive"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be positive"),
        ({"max_variance": 0.0}, "max_variance"),
        ({"max_variance": 5.0, "beta2": 0.0}, "beta2 must be in"),
        ({"state_dtype": "8bit"}, "set optimizer.max_variance to null"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        OptimizerConfig(**settings)


def adamw_by_hand(weight: Tensor, gradients: list[Tensor], optim: OptimizerConfig, rate: float) -> Tensor:
    """AdamW as it is written, the variance clipped by value before it is used."""
    mean, variance = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        mean = optim.beta1 * mean + (1 - optim.beta1) * gradient
        variance = optim.beta2 * variance + (1 - optim.beta2) * gradient.square()
        if optim.max_variance is not None:
            variance = variance.clamp(max=optim.max_variance)
        corrected = variance / (1 - optim.beta2**step)
        weight = weight - rate * mean / (1 - optim.beta1**step) / (corrected.sqrt() + optim.eps)
    return weight


@pytest.mark.parametrize("limit", [5.0, 1.0, None])
def test_the_variance_is_clipped_before_parameter_and_moment_see_it(limit):
    """Gradients up to 4, as clipping their norm leaves; the first values reach the limit, the last never
    do."""
    optim = OptimizerConfig(lr=Schedule(0.01, 0.01), warmup_steps=0, weight_decay=0.0, max_variance=limit)
    layer = nn.Linear(4, 1, bias=False).double()
    start = layer.weight.detach().clone()
    gradients = [
        torch.tensor([[4.0, -4.0, 2.0, 0.1]], dtype=torch.float64) * (-1) ** (i // 7) for i in range(80)
    ]
    (optimizer,) = build_optimizers(layer, optim)
    for gradient in gradients:
        layer.weight.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), adamw_by_hand(start, gradients, optim, 0.01))
    variance = optimizer.state[layer.weight]["exp_avg_sq"]
    assert (variance > 5 + 1e-9).tolist() == [[limit is None] * 2 + [False] * 2]
    if limit == 5:
        assert variance[0, :2].tolist() == pytest.approx([5.0, 5.0])


def test_a_gradient_beyond_all_bounds_leaves_the_variance_finite_and_positive():
    layer = nn.Linear(1, 1, bias=False)
    (optimizer,) = build_optimizers(
        layer, OptimizerConfig(lr=Schedule(0.01, 0.01), warmup_steps=0, max_grad_norm=None)
    )
    for gradient in (1.0, 1e10, 1.0, 0.0, 0.0):
        layer.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        variance = optimizer.state[layer.weight]["exp_avg_sq"]
        assert torch.isfinite(layer.weight).all()
        assert (variance >= 0).all()
    assert float(variance) <= 5


def test_parameters_are_bounded_in_parts(monkeypatch):
    """Whatever fits at once, every parameter is bounded."""
    monkeypatch.setattr("dalle.train.optimizer.CHUNK", 5)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3), nn.Linear(3, 1))
    optimizers = build_optimizers(
        model, OptimizerConfig(lr=Schedule(0.0, 0.0), warmup_steps=0, max_variance=1e-3)
    )
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1)
        optimizers[0].step()
    variances = [moments["exp_avg_sq"] for moments in optimizers[0].state.values()]
    assert len(variances) == 6
    assert all(torch.allclose(v, torch.full_like(v, 1e-3)) for v in variances)


def test_the_dvae_and_clip_have_no_bound_and_no_plateau_of_their_papers():
    for training in (PAPER_TRAINING, CLIP_TRAINING):
        assert training.optimizer.max_variance is None
        assert training.optimizer.plateau.max_reductions == 0
    assert OptimizerConfig().max_variance == 5
    assert OptimizerConfig().plateau.max_reductions == 5

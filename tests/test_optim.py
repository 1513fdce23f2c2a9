"""AdamW's groups: weight decay on matrices and convolutions only (appendix B.2)."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dalle.models import build
from dalle.train import Schedule
from dalle.train.optim import OptimizerConfig, build_optimizer, decay_groups


@pytest.fixture(params=["dvae", "transformer", "clip"])
def model(request: pytest.FixtureRequest, tiny_runs: SimpleNamespace) -> nn.Module:
    return build(request.param, getattr(tiny_runs, request.param).model)


def names(group) -> set[str]:
    return {name for name, _ in group}


def test_every_parameter_is_in_one_group(model):
    decay, keep = decay_groups(model)
    assert names(decay) | names(keep) == {name for name, _ in model.named_parameters()}
    assert not names(decay) & names(keep)


def test_gains_biases_and_embeddings_do_not_decay(model):
    embeddings = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    vectors = {name for name, p in model.named_parameters() if p.ndim < 2}
    assert vectors
    assert vectors | embeddings <= names(decay_groups(model)[1])


def test_matrices_and_convolutions_decay(model):
    weights = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    weights |= {name for name, p in model.named_parameters() if p.ndim == 4}
    assert weights
    assert weights <= names(decay_groups(model)[0])


def test_the_position_and_class_embeddings_of_clip_do_not_decay(tiny_runs):
    """They are bare parameters: one is a matrix by its shape, though none by its use."""
    embeddings = {"net.visual.positional_embedding", "net.visual.class_embedding", "net.positional_embedding"}
    kept = names(decay_groups(build("clip", tiny_runs.clip.model))[1])
    assert embeddings | {"net.token_embedding.weight", "net.logit_scale"} <= kept


def test_decay_shrinks_matrices_by_step_size_times_decay_and_leaves_the_rest():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig(lr=Schedule(0.1, 0.1), warmup=0, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    after = dict(model.named_parameters())
    torch.testing.assert_close(after["1.weight"], before["1.weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(after["1.bias"], before["1.bias"])
    assert torch.equal(after["0.weight"], before["0.weight"])


def test_the_settings_reach_adamw():
    optimizer = build_optimizer(nn.Linear(2, 2), OptimizerConfig())
    matrix, vector = optimizer.param_groups
    assert (matrix["betas"], matrix["eps"], matrix["weight_decay"]) == ((0.9, 0.96), 1e-8, 4.5e-2)
    assert vector["weight_decay"] == 0


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    held = [p for group in build_optimizer(model, OptimizerConfig()).param_groups for p in group["params"]]
    assert len(held) == 2
    assert all(p.requires_grad for p in held)

"""fp16 with a gradient scale per resblock: its rules and the flow of Figure 4 (section 2.4, appendix D)."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from dalle.nn.blocks import ResidualBlock, scale_gradient
from dalle.schedules import Schedule
from dalle.train.config import EMAConfig, OptimizerConfig
from dalle.train.distributed import Distributed
from dalle.train.grad_scaler import GlobalGradScaler, PerBlockGradScaler, build_grad_scaler
from dalle.train.optimizer import build_optimizers
from dalle.train.state import EMA, TrainState
from dalle.train.step import train_step
from dalle.train.trainer import init_train_state
from dalle.transformer import Transformer, TransformerConfig
from dalle.transformer.objective import TransformerObjective
from tests.helpers import distributed_work as cases
from tests.helpers.line import log_lines, newest_files

CONFIG = TransformerConfig(2, 2, 8, 4, (3, 3), 8, 8, conv_kernel=3, init_scale=1.0)


def blocks(count: int = 3) -> list[ResidualBlock]:
    torch.manual_seed(0)
    return [ResidualBlock(4, nn.Linear(4, 4)) for _ in range(count)]


GROWTH, BACKOFF = 2 ** (1 / 1000), 1 / math.sqrt(2)


@pytest.mark.parametrize(
    ("steps", "factor"),
    [
        ([], 1.0),
        ([True] * 1000, 2.0),
        ([True, False], GROWTH * BACKOFF),
        ([False, True, False], BACKOFF * GROWTH),  # at most one division in 125 steps
        ([False] * 125, BACKOFF),
        ([False] * 126, BACKOFF**2),
        ([False] * 251, BACKOFF**3),
    ],
)
def test_a_scale_starts_at_two_to_the_thirteen_and_follows_its_own_resblock(steps, factor):
    scales = PerBlockGradScaler(blocks(2))
    for finite in steps:
        scales.update(torch.tensor([finite, True]))
    assert scales.values.tolist() == pytest.approx([2**13 * factor, 2**13 * GROWTH ** len(steps)], rel=1e-4)


def test_scales_stay_between_their_bounds_and_the_resblocks_see_them():
    made = blocks(2)
    scales = PerBlockGradScaler(made)
    bounds = torch.tensor([2.0**7, 2.0**24])
    scales.load_state_dict({"values": bounds, "since_backoff": torch.tensor([125, 4])})
    scales.update(torch.tensor([False, True]))
    assert [float(block.gradient_scale) for block in made] == scales.values.tolist() == bounds.tolist()
    scales.update(torch.tensor([True, True]))
    assert float(made[0].gradient_scale) > 2.0**7


def test_scales_of_another_model_and_models_without_resblocks_are_refused():
    with pytest.raises(ValueError, match="2 gradient scales for 3 resblocks"):
        PerBlockGradScaler(blocks(3)).load_state_dict(PerBlockGradScaler(blocks(2)).state_dict())
    with pytest.raises(ValueError, match="Linear has no gradient scales for fp16"):
        build_grad_scaler(nn.Linear(2, 2))


def trunk(made: list[ResidualBlock], x: torch.Tensor) -> torch.Tensor:
    for block in made:
        x = x + block(x)
    return x


def test_scaling_changes_no_gradient_in_fp32():
    made = blocks()
    x = torch.randn(2, 4, requires_grad=True)
    tensors = (x, *(p for block in made for p in block.parameters()))
    expected = torch.autograd.grad(trunk(made, x).square().sum(), tensors)
    scales = PerBlockGradScaler(made)
    scales.values.copy_(torch.tensor([2.0**7, 2.0**13, 2.0**20]))
    trunk(made, x).square().sum().backward()
    assert scales.unscale().all()
    torch.testing.assert_close([tensor.grad for tensor in tensors], list(expected))


def test_inside_a_resblock_the_path_is_fp16_and_its_gradient_scaled_and_the_trunk_is_fp32():
    (block,) = made = blocks(1)
    PerBlockGradScaler(made)
    gradients, dtypes = [], []
    block.f.register_full_backward_hook(lambda module, inputs, outputs: gradients.append(outputs[0].clone()))
    block.f.register_forward_hook(lambda module, inputs, out: dtypes.append((inputs[0].dtype, out.dtype)))
    with torch.autocast("cpu", dtype=torch.float16):
        out = block(torch.randn(2, 4, requires_grad=True))
    out.sum().backward()
    assert out.dtype == torch.float32
    assert dtypes == [(torch.float32, torch.float16)]
    assert (gradients[0] == 2.0**13).all()


def test_a_factor_beyond_the_range_becomes_zero_not_infinite():
    x = torch.ones(3, requires_grad=True)
    scale_gradient(x, torch.tensor(torch.inf)).sum().backward()
    assert x.grad.tolist() == [0, 0, 0]


def test_a_bad_resblock_spoils_neither_the_trunk_nor_the_scales_of_others():
    made = blocks()
    scales = PerBlockGradScaler(made)
    x = torch.randn(2, 4, requires_grad=True)
    made[1].f.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * torch.inf,))
    made[1].f.weight.register_hook(lambda gradient: gradient * torch.inf)
    trunk(made, x).square().sum().backward()
    assert torch.isfinite(x.grad).all()
    finite = scales.unscale()
    assert finite.tolist() == [True, False, True]
    scales.update(finite)
    assert (scales.values > 2.0**13).tolist() == [True, False, True]


OPTIM = OptimizerConfig(lr=Schedule(1e-3, 1e-3), warmup_steps=0)


@pytest.fixture
def state() -> TrainState:
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    optimizers = build_optimizers(model, OPTIM)
    return TrainState(model, optimizers, EMA(model, EMAConfig()), build_grad_scaler(model))


def step(state: TrainState):
    ids = state.model.layout.pack(torch.randint(8, (4, 4)), torch.randint(8, (4, 9)))
    return train_step(state, ids, TransformerObjective(), OPTIM, "fp16", seed=0)


def test_an_overflow_skips_the_update_and_counts_as_a_step(state):
    step(state)
    before = [p.detach().clone() for p in state.model.parameters()]
    handle = state.model.resblocks()[2].f.out.weight.register_hook(lambda gradient: gradient * torch.nan)
    loss, norm = step(state)
    handle.remove()
    assert loss.metrics["skipped_steps"] == 1
    assert not torch.isfinite(norm)
    assert all(torch.equal(p, old) for p, old in zip(state.model.parameters(), before, strict=True))
    assert state.step == 2
    assert (state.scales.values < 2.0**13).tolist() == [False, False, True, False]
    assert step(state)[0].metrics["skipped_steps"] == 1
    assert any(not torch.equal(p, old) for p, old in zip(state.model.parameters(), before, strict=True))


def test_an_infinite_loss_ends_the_run_all_the_same(state):
    with torch.no_grad():
        state.model.to_logits.weight.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="to_logits"):
        step(state)


@pytest.mark.parametrize(
    ("steps", "scale"),
    [([], 2**16), ([True] * 1999, 2**16), ([True] * 2000, 2**17), ([False] * 3, 2**13), ([False] * 20, 1)],
)
def test_the_scale_on_a_loss_follows_torchs_rule(steps, scale):
    scaler = GlobalGradScaler(nn.Linear(2, 2))
    expected = torch.amp.GradScaler("cpu")
    expected.scale(torch.ones(()))  # makes its tensors
    for finite in steps:
        scaler.update(torch.tensor([finite]))
        found_inf = torch.tensor(float(not finite))
        torch._amp_update_scale_(expected._scale, expected._growth_tracker, found_inf, 2.0, 0.5, 2000)
    assert scaler.values.tolist() == [scale]
    assert scale == max(1.0, expected.get_scale())


@pytest.mark.parametrize("family", ["dvae", pytest.param("clip", marks=pytest.mark.slow)])
def test_a_dvae_and_a_clip_learn_in_fp16_and_resume_bit_for_bit(family, tmp_path):
    case = replace(cases.PLAIN[family], train={"precision": "fp16", "save_every": 2}, stops=(4,))
    state = cases.train(case, Distributed(), tmp_path / "whole")
    cases.train(replace(case, stops=(2, 4)), Distributed(), tmp_path / "split")
    assert newest_files(tmp_path / "whole") == newest_files(tmp_path / "split")
    assert state.scales.state_dict()["finite_in_a_row"] > 0
    lines = [log_lines(tmp_path / name) for name in ("whole", "split")]
    assert lines[0] == lines[1]
    assert lines[0][-1]["grad_scale_log2"] == [16 - lines[0][-1]["skipped_steps"]]


def test_a_loss_that_overflows_halves_the_scale_and_its_gradient_is_that_of_fp32():
    case = cases.PLAIN["dvae"]
    config, norms = replace(cases.TRAIN, precision="fp16", optimizer=OPTIM), []
    for precision, start in (("fp32", 1.0), ("fp16", 2.0**16), ("fp16", 2.0**24)):
        torch.manual_seed(0)
        state = init_train_state(case.model(), replace(config, precision=precision), 0, Distributed())
        if state.scales:
            state.scales.values.fill_(start)
        loss, norm = train_step(state, case.batch(0), case.objective, OPTIM, precision, 0, look=False)
        norms.append(float(norm))
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)
    assert not math.isfinite(norms[2])
    assert (state.scales.values.item(), loss.metrics["skipped_steps"]) == (2.0**23, 1)

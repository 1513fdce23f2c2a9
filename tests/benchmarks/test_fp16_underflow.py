"""Underflow by one gradient scale: the made spread of gradients, torch's law of one scale, and what a report holds."""

import json
from dataclasses import replace

import pytest
import torch

from dalle.benchmarks.common import Stepper
from dalle.benchmarks.studies.fp16_underflow import (
    OURS,
    WAYS,
    OneScale,
    UnderflowBenchmark,
    benchmark_underflow,
    optimizer,
    spread,
    zero_shares,
)
from dalle.benchmarks.studies.powersgd import ColorTokens
from dalle.train.grad_scaler import PerBlockGradScaler
from dalle.train.precision import autocast
from dalle.transformer import Transformer, TransformerConfig
from dalle.transformer.objective import TransformerObjective

SMALL = replace(UnderflowBenchmark().model, depth=3, head_dim=8)
POWERS = (*[-28] * 5, 5)
CPU = torch.device("cpu")
NOISE = "f.qkv.bias"
"""A bias of all keys changes no softmax: its gradient is 0 but for rounding."""
DATA = ColorTokens(SMALL.layout, seed=0)


def model(*powers: int) -> Transformer:
    """Weights of seed 0, the output's not 0, so that gradients flow at once."""
    torch.manual_seed(0)
    made = Transformer(SMALL)
    torch.nn.init.normal_(made.to_logits.weight, std=0.1)
    if powers:
        spread(made.resblocks(), powers)
    return made


def backward(made: Transformer, precision: str = "fp32") -> torch.Tensor:
    """The loss of two images; its gradients stand in the parameters."""
    with autocast(precision, CPU):
        loss = TransformerObjective()(made, DATA(range(2)), 0).total
    loss.backward()
    return loss.detach()


# ---------------------------------------------------------------------------------------------
# The spread
# ---------------------------------------------------------------------------------------------


def test_the_spread_multiplies_the_gradients_of_each_resblock_and_changes_no_other():
    plain, powers = model(), (5, -3, 2, 0, -20, 8)
    made = model(*powers)
    assert backward(plain) == backward(made)
    for power, ours, theirs in zip(powers, made.resblocks(), plain.resblocks(), strict=True):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad * 2.0**power)
    for ours, theirs in ((made.row, plain.row), (made.to_logits, plain.to_logits)):
        assert torch.equal(ours.weight.grad, theirs.weight.grad)


def test_in_fp32_training_is_the_same_but_for_rounding():
    weights = []
    for powers in [(0,) * 6, (8, 0, -5, -10, -20, -25)]:
        step = Stepper("transformer", SMALL, TransformerObjective(), CPU, "fp32", optim=optimizer(2e-3))
        spread(step.model.resblocks(), powers)
        for update in range(5):
            weights.append({name: p.detach().clone() for name, p in step.model.named_parameters()})
            step(DATA(range(update, update + 1)))
    start, plain, made = weights[0], weights[4], weights[-1]
    for name in start:
        if not name.endswith(NOISE):
            learned, differs = (
                torch.linalg.vector_norm(made[name] - other[name]) for other in (start, plain)
            )
            assert learned > 1e-5, name
            assert differs < 0.01 * learned, name


# ---------------------------------------------------------------------------------------------
# One scale
# ---------------------------------------------------------------------------------------------


def test_one_scale_follows_the_law_of_torch():
    """Both are driven by the same updates: now and then an overflow, thousands of finite ones between."""
    blocks = model().resblocks()
    ours, theirs = OneScale(blocks), torch.amp.GradScaler("cpu")
    weight = torch.nn.Parameter(torch.ones(()))
    sgd = torch.optim.SGD([weight], lr=0.0)
    for update in range(3700):
        bad = update in (0, 1, 1500, 3600)
        weight.grad = None
        (theirs.scale(weight) * (torch.inf if bad else 1.0)).backward()
        theirs.step(sgd)
        theirs.update()
        finite = torch.ones(len(blocks), dtype=torch.bool)
        finite[update % len(blocks)] = not bad
        ours.update(finite)
        assert ours.values.tolist() == [theirs.get_scale()] * len(blocks), update
    assert theirs.get_scale() == 2.0**13  # four times halved, once doubled


# ---------------------------------------------------------------------------------------------
# What one scale loses
# ---------------------------------------------------------------------------------------------


def test_resblocks_that_one_scale_leaves_without_gradients_have_them_by_their_own():
    """The last resblock allows no larger scale than 2^10, and at that the gradients of the others are 0 in fp16."""
    exact = model(*POWERS)
    backward(exact)
    dead, alive = model(*POWERS), model(*POWERS)
    one, own = OneScale(dead.resblocks()), PerBlockGradScaler(alive.resblocks())
    one.values.fill_(2.0**10)
    own.values.copy_(torch.tensor([2.0**24] * 5 + [2.0**10]))
    for made, scales in ((dead, one), (alive, own)):
        backward(made, "fp16")
        assert scales.unscale().all()
    assert zero_shares(dead.resblocks()) == [*[1.0] * 5, pytest.approx(0.0, abs=0.01)]
    for block, reference in zip(alive.resblocks(), exact.resblocks(), strict=True):
        for (name, p), q in zip(block.named_parameters(), reference.parameters(), strict=True):
            if name != NOISE:
                assert torch.linalg.vector_norm(p.grad - q.grad) < 0.01 * torch.linalg.vector_norm(q.grad), (
                    name
                )


def test_the_last_resblock_allows_no_larger_scale():
    made = model(*POWERS)
    scales = OneScale(made.resblocks())
    scales.values.fill_(2.0**16)
    backward(made, "fp16")
    assert scales.unscale().tolist() == [True] * 5 + [False]


def test_shares_of_zeros_count_elements():
    block = torch.nn.Linear(3, 1)
    block.weight.grad, block.bias.grad = torch.tensor([[0.0, 1.0, -1.0]]), torch.tensor([0.0])
    assert zero_shares([block]) == [0.5]


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------


def test_the_report_has_every_way_and_the_images_are_drawn(tmp_path):
    places = {name: tmp_path / "a" / f"{name}.png" for name in ("image", "scales")}
    run = UnderflowBenchmark(
        model=SMALL, powers=POWERS, updates=4, every=2, batch_size=1, json=tmp_path / "b.json", **places
    )
    report = benchmark_underflow(run)
    assert json.loads((tmp_path / "b.json").read_text())["ways"] == report["ways"]
    assert report["ways"].keys() == report["curves"].keys() == WAYS.keys()
    assert report["settings"]["powers"] == POWERS
    for way, lines in report["curves"].items():
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        looks = [line for line in lines if "zeros" in line]
        assert [line["step"] for line in looks] == [2, 4]
        assert all(len(line["zeros"]) == 6 for line in looks)
        assert report["ways"][way] == {"loss": lines[-1]["loss"], "skipped": 0, "zeros": looks[-1]["zeros"]}
    scales = {way: report["curves"][way][-1].get("grad_scale_log2") for way in WAYS}
    assert scales == {"fp32": None, "fp16, one scale": [16.0] * 6, OURS: pytest.approx([13.004] * 6)}
    assert len({lines[0]["loss"] for lines in report["curves"].values()}) == 1  # same weights, same images
    assert all(path.stat().st_size > 0 for path in places.values())


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"updates": 0}, "must be positive"),
        ({"updates": 10, "every": 11}, "every at most updates"),
        ({"powers": (1, 2)}, "one for each of 16 resblocks"),
        ({"powers": (0,) * 15 + (-41,)}, "within 40 of 0"),
        ({"model": TransformerConfig(depth=8)}, "grid"),
    ],
)
def test_a_run_that_cannot_be_is_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        UnderflowBenchmark(**wrong)

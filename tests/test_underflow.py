"""Underflow by one gradient scale: the made spread of gradients, torch's law of one scale, and what a report holds."""

import json
from dataclasses import replace

import pytest
import torch

from dalle.objectives import TransformerObjective
from dalle.stages.compression import ColourTokens
from dalle.stages.measure import Stepper
from dalle.stages.underflow import (
    OURS,
    WAYS,
    OneScale,
    UnderflowBenchmark,
    benchmark_underflow,
    optimizer,
    spread,
    zero_shares,
)
from dalle.train.precision import autocast
from dalle.train.scaling import GradientScales
from dalle.transformer import Transformer, TransformerConfig

SMALL = replace(UnderflowBenchmark().model, depth=3, head_width=8)
CPU = torch.device("cpu")
DATA = ColourTokens(SMALL.layout, seed=0)


def model(*powers: int) -> Transformer:
    """Weights of seed 0, the output's not 0, so that gradients flow at once."""
    torch.manual_seed(0)
    made = Transformer(SMALL)
    torch.nn.init.normal_(made.to_logits.weight, std=0.1)
    if powers:
        spread(made, powers)
    return made


def backward(made: Transformer, precision: str = "fp32") -> torch.Tensor:
    """The loss of two pictures; its gradients stand in the parameters."""
    with autocast(precision, CPU):
        loss = TransformerObjective()(made, DATA(range(2)), 0).total
    loss.backward()
    return loss.detach()


# ---------------------------------------------------------------------------------------------
# The spread
# ---------------------------------------------------------------------------------------------


def test_the_spread_multiplies_the_gradients_of_each_layer_and_changes_no_loss():
    plain, powers = model(), (5, -3, -20)
    made = model(*powers)
    assert backward(plain) == backward(made)
    for power, ours, theirs in zip(powers, made.layers, plain.layers, strict=True):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad * 2.0**power)
    assert torch.equal(made.row.weight.grad, plain.row.weight.grad * 2.0**5)
    assert torch.equal(made.to_logits.weight.grad, plain.to_logits.weight.grad)


def test_in_fp32_training_is_the_same_bit_for_bit():
    weights = []
    for powers in [(0, 0, 0), (9, -3, -24)]:
        step = Stepper("transformer", SMALL, TransformerObjective(), CPU, "fp32", optim=optimizer(2e-3))
        spread(step.model, powers)
        for update in range(4):
            step(DATA(range(update, update + 1)))
        weights.append(torch.cat([p.detach().flatten() for p in step.model.parameters()]))
    assert torch.equal(*weights)


# ---------------------------------------------------------------------------------------------
# One scale
# ---------------------------------------------------------------------------------------------


def test_one_scale_follows_the_law_of_torch():
    """Both are driven by the same updates: now and then an overflow, thousands of finite ones between."""
    blocks = model().resblocks()
    ours, theirs = OneScale(blocks), torch.amp.GradScaler("cpu")
    weight = torch.nn.Parameter(torch.ones(()))
    sgd = torch.optim.SGD([weight], lr=0.0)
    for update in range(6500):
        bad = update in (0, 1, 7, 2500, 2501)
        weight.grad = None
        (theirs.scale(weight) * (torch.inf if bad else 1.0)).backward()
        theirs.step(sgd)
        theirs.update()
        finite = torch.ones(len(blocks), dtype=torch.bool)
        finite[update % len(blocks)] = not bad
        ours.update(finite)
        assert ours.values.tolist() == [theirs.get_scale()] * len(blocks), update
    assert theirs.get_scale() == 2.0**13  # five times halved, twice doubled


# ---------------------------------------------------------------------------------------------
# What one scale loses
# ---------------------------------------------------------------------------------------------


def test_a_resblock_that_one_scale_leaves_without_gradients_learns_with_its_own():
    """The first layer allows no larger scale than 2^10, and at that the last layer's gradients are 0 in fp16."""
    powers = (14, -10, -28)
    exact = model(*powers)
    backward(exact)
    dead, alive = model(*powers), model(*powers)
    one, own = OneScale(dead.resblocks()), GradientScales(alive.resblocks())
    one.values.fill_(2.0**10)
    own.values.copy_(torch.tensor([2.0**10] * 2 + [2.0**16] * 2 + [2.0**24] * 2))
    for made, scales in ((dead, one), (alive, own)):
        backward(made, "fp16")
        assert scales.unscale().all()
    assert zero_shares(dead.resblocks())[-2:] == [1.0, 1.0]
    assert max(zero_shares(alive.resblocks())) < 0.5
    for block, reference in zip(alive.resblocks(), exact.resblocks(), strict=True):
        for (name, p), q in zip(block.named_parameters(), reference.parameters(), strict=True):
            if name != "f.qkv.bias":  # of the keys it is 0 but for rounding
                assert torch.linalg.vector_norm(p.grad - q.grad) < 0.01 * torch.linalg.vector_norm(q.grad), name


def test_the_first_layer_allows_no_larger_scale():
    made = model(14, -10, -28)
    scales = OneScale(made.resblocks())
    scales.values.fill_(2.0**17)
    backward(made, "fp16")
    assert scales.unscale().tolist() == [False, False, True, True, True, True]


def test_shares_of_zeros_count_elements():
    block = torch.nn.Linear(3, 1)
    block.weight.grad, block.bias.grad = torch.tensor([[0.0, 1.0, -1.0]]), torch.tensor([0.0])
    assert zero_shares([block]) == [0.5]


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------


def test_the_report_has_every_way_and_the_pictures_are_drawn(tmp_path):
    places = {name: tmp_path / "a" / f"{name}.png" for name in ("picture", "scales")}
    run = UnderflowBenchmark(
        model=SMALL, powers=(9, 0, -24), updates=4, every=2, batch_size=1, json=tmp_path / "b.json", **places
    )
    report = benchmark_underflow(run)
    assert json.loads((tmp_path / "b.json").read_text())["ways"] == report["ways"]
    assert report["ways"].keys() == report["curves"].keys() == WAYS.keys()
    assert report["settings"]["powers"] == (9, 0, -24)
    for way, lines in report["curves"].items():
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        looks = [line for line in lines if "zeros" in line]
        assert [line["step"] for line in looks] == [2, 4]
        assert all(len(line["zeros"]) == 6 for line in looks)
        assert report["ways"][way] == {"loss": lines[-1]["loss"], "skipped": 0, "zeros": looks[-1]["zeros"]}
    scales = {way: report["curves"][way][-1].get("log2_scales") for way in WAYS}
    assert scales == {"fp32": None, "fp16, one scale": [16.0] * 6, OURS: pytest.approx([13.004] * 6)}
    assert len({lines[0]["loss"] for lines in report["curves"].values()}) == 1  # same weights, same pictures
    assert all(path.stat().st_size > 0 for path in places.values())


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"updates": 0}, "updates, batch-size and every must be positive"),
        ({"updates": 10, "every": 11}, "every at most updates"),
        ({"powers": (1, 2)}, "one for each of 8 layers"),
        ({"powers": (0,) * 7 + (-41,)}, "within 40 of 0"),
        ({"model": TransformerConfig(depth=8)}, "grid"),
    ],
)
def test_a_run_that_cannot_be_is_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        UnderflowBenchmark(**wrong)

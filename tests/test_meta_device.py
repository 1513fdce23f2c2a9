"""Models built from slices of their parameters: the first values of a whole model, bit for bit."""

import pytest
import torch
from torch import nn

from dalle.clip import CLIP
from dalle.dvae import DVAE
from dalle.meta_device import build_in_slices
from dalle.transformer import Transformer
from tests.helpers.distributed_work import CLIP_CONFIG, DVAE_CONFIG, TRANSFORMER_CONFIG


@pytest.mark.parametrize(
    ("family", "config"),
    [(Transformer, TRANSFORMER_CONFIG), (DVAE, DVAE_CONFIG), (CLIP, CLIP_CONFIG)],
)
def test_values_and_random_numbers_are_those_of_the_whole_model(family, config):
    torch.manual_seed(3)
    whole, after = family(config), torch.get_rng_state()
    torch.manual_seed(3)
    model, slices = build_in_slices(lambda: family(config), torch.clone)
    assert torch.equal(torch.get_rng_state(), after)
    for name, parameter in whole.named_parameters():
        assert torch.equal(slices.get(name, parameter), parameter), name
    on_cpu = {name for name, p in model.named_parameters() if not p.is_meta}
    assert on_cpu == {name for name, p in whole.named_parameters() if p.ndim == 0}
    assert not any(buffer.is_meta for buffer in model.buffers())


def first_row(weight):
    weight[0] = 1.0


@pytest.mark.parametrize("change", [first_row, lambda w: w.data.mul_(2), lambda w: w.mul_(torch.ones(3))])
def test_an_initialization_that_slices_cannot_follow_is_an_error(change):
    @torch.no_grad()
    def make():
        linear = nn.Linear(3, 3)
        change(linear.weight)
        return linear

    with pytest.raises(NotImplementedError, match="cannot be done on slices"):
        build_in_slices(make, torch.clone)

"""No training step waits for a GPU unless it logs, and steps that are not finite are skipped all the same."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from dalle.clip import CLIP
from dalle.dvae import DVAE, losses
from dalle.train.config import EMAConfig, OptimizerConfig
from dalle.train.distributed import Distributed
from dalle.train.step import to_device, train_step
from dalle.train.trainer import init_train_state
from dalle.transformer import Transformer
from dalle.unet import UNet, objective
from tests.helpers import distributed_work as cases
from tests.helpers.host_waits import HostWaits
from tests.helpers.pretended_cuda import only_real

FAMILIES = ("transformer", "dvae", "clip", "diffusion")
MUON = replace(cases.TRAIN.optimizer, muon_lr_scale=5.0)
VARIANTS = {
    "fp32": {"ema": EMAConfig()},
    "bf16, accumulated": {"precision": "bf16", "grad_accum_steps": 2},
    "fp16": {"precision": "fp16"},
    "muon": {"optimizer": MUON},
    "paper": {"optimizer": OptimizerConfig(state_dtype="paper"), "ema": EMAConfig()},
}


def stepper(family: str, device: torch.device | str = "cpu", **changes):
    """The state of a training, and a function that trains on a batch."""
    case, config = cases.PLAIN[family], replace(cases.TRAIN, **changes)
    torch.manual_seed(0)
    state = init_train_state(case.model().to(device), config, 0, Distributed())

    def step(batch, look=False):
        passes = 1 if family == "clip" else config.grad_accum_steps
        arguments = (config.optimizer, config.precision, 0, Distributed(), passes, look)
        return train_step(state, batch, case.objective, *arguments)

    return state, step, case.batch


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_that_does_not_log_reads_nothing_from_the_device(family, variant):
    if (family, variant) == ("dvae", "muon"):
        pytest.skip("a dVAE has no stack of layers for Muon")
    _, step, batch = stepper(family, **VARIANTS[variant])
    first, second = batch(0), batch(1)
    step(first)
    with HostWaits() as waits:
        step(second)
    assert not waits.found


@only_real
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_torch_finds_no_wait_for_cuda_either(family, variant, cuda):
    if (family, variant) == ("dvae", "muon"):
        pytest.skip("a dVAE has no stack of layers for Muon")
    _, step, batch = stepper(family, cuda, **VARIANTS[variant])
    batches = [to_device(batch(i), cuda) for i in range(3)]
    step(batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batches[1])
        step(batches[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_counter_counts():
    mask = torch.tensor([True, False])
    with HostWaits() as waits:
        bool(mask.any())
        mask[mask].sum()
        torch.bincount(mask.int())
        mask.tolist()
    assert waits.found == {"_local_scalar_dense": 1, "index": 1, "bincount": 1, "tolist": 1}


MODELS = {
    "transformer": lambda: Transformer(cases.TRANSFORMER_CONFIG),
    "dvae": lambda: DVAE(cases.DVAE_CONFIG),
    "clip": lambda: CLIP(cases.CLIP_CONFIG),
    "diffusion": lambda: UNet(cases.UNET_CONFIG),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_number_is_copied_to_a_gpu_in_the_forward_pass(family, monkeypatch):
    """By fake tensors that claim to be on one: a tensor made of Python numbers is such a copy."""
    for module in (losses, objective):
        numbers = lambda like, first, normal=False: torch.rand_like(like)  # noqa: E731
        monkeypatch.setattr(module, "numbers_by_place", numbers)
    case = cases.PLAIN[family]
    real = case.batch(0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = MODELS[family]()
        batch = tree_map(lambda like: torch.empty(like.shape, dtype=like.dtype, device="cuda"), real)
        case.objective(model, batch, 0)  # builds masks
        with HostWaits() as waits:
            case.objective(model, batch, 0)
    assert not waits.found


@pytest.mark.parametrize("optimizer", [cases.TRAIN.optimizer, MUON, OptimizerConfig(state_dtype="paper")])
def test_a_skipped_step_changes_nothing_and_the_run_ends_once_the_host_looks(optimizer):
    state, step, batch = stepper("transformer", optimizer=optimizer, max_skipped_steps=2)

    def tensors():
        contents = state.state_dict()[0]
        return {f"{f}/{n}": t.clone() for f, each in contents.items() for n, t in each.items()}

    step(batch(0))
    before = tensors()
    handle = state.model.to_logits.weight.register_hook(lambda gradient: gradient * torch.nan)
    step(batch(1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors().items())
    with pytest.raises(FloatingPointError, match=r"gradient of to_logits\.weight"):
        step(batch(2))
    handle.remove()
    assert state.extras["nonfinite"].state_dict() == {"skipped": 2, "in_a_row": 2}

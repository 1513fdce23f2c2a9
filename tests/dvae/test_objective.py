"""Loss and metrics of the dVAE against formulas (dalle/dvae/objective.py, dalle/dvae/metrics.py)."""

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from dalle.dvae import DVAE, DVAEConfig, DVAELossConfig, losses
from dalle.dvae.losses import gumbel_softmax, kl_to_uniform, logit_laplace_log_prob
from dalle.dvae.metrics import code_usage, collapse_warning, dvae_scores
from dalle.dvae.model import Conv2d, map_pixels
from dalle.dvae.objective import DVAEObjective
from dalle.schedules import Schedule
from dalle.train.precision import autocast


@pytest.fixture(scope="module")
def model() -> DVAE:
    torch.manual_seed(0)
    return DVAE(DVAEConfig((8, 8), 1, 2, vocab_size=6, codebook_dim=4))


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("step", "tau", "beta"), [(0, 1.0, 0.5), (5, 0.75, 1.75), (20, 0.5, 3.0)])
def test_the_dvae_minimizes_reconstruction_plus_beta_times_kl_per_pixel_value(model, pixels, step, tau, beta):
    """Eq. 1 and A.2: both terms are sums over an image divided by its pixel values."""
    schedules = Schedule(1.0, 0.5, 10, "linear"), Schedule(0.5, 3.0, 10, "linear")
    objective = DVAEObjective(DVAELossConfig(*schedules))
    torch.manual_seed(3)
    loss = objective(model, pixels, step)
    torch.manual_seed(3)
    logits = model.codebook_logits(pixels)
    mu, log_b = model.reconstruct(gumbel_softmax(logits, tau))
    nats = -logit_laplace_log_prob(map_pixels(pixels), mu, log_b).sum() / pixels.numel()
    kl = kl_to_uniform(logits).sum() / pixels.numel()
    torch.testing.assert_close(loss.total, nats + beta * kl)
    assert loss.metrics["tau"] == pytest.approx(tau)
    assert loss.metrics["beta"] == pytest.approx(beta)
    torch.testing.assert_close(loss.metrics["kl"], kl_to_uniform(logits).mean().detach())


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.1), ("fp16", 0.02)])
def test_on_cuda_loss_and_gradients_are_those_of_the_cpu(
    precision, tolerance, model, pixels, cuda, monkeypatch
):
    """With the CPU's noise. The relaxation is in fp32 between convolutions in 16 bit."""
    noise, found = losses.numbers_by_place, []
    monkeypatch.setattr(
        losses, "numbers_by_place", lambda like, first: noise(like.cpu(), first).to(like.device)
    )
    for device, kind in ((torch.device("cpu"), "fp32"), (cuda, precision)):
        torch.manual_seed(3)
        own, images = deepcopy(model).to(device), pixels.to(device)
        with autocast(kind, device):
            total = DVAEObjective()(own, images, 5).total
            assert own.codebook_logits(images).dtype == torch.float32
        total.backward()
        assert {p.grad.device for p in own.parameters()} == {device}
        gradients = torch.cat([p.grad.cpu().flatten() for p in own.parameters()])
        found.append((float(total.detach()), gradients))
    (expected, of_cpu), (value, of_cuda) = found
    assert value == pytest.approx(expected, abs=tolerance)
    assert (of_cuda - of_cpu).norm() < tolerance * of_cpu.norm()


def test_training_lowers_the_loss(model):
    torch.manual_seed(0)
    model, objective = DVAE(model.config), DVAEObjective()
    colors = torch.eye(3)[:, :, None, None].expand(3, 3, 8, 8)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(40):
        loss = objective(model, colors, 0).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_tau_stays_above_zero():
    with pytest.raises(ValueError, match="tau"):
        DVAELossConfig(tau=Schedule(1.0, 0.0, 10))


def test_code_usage_by_hand():
    """Codes 0, 0, 1, 3 of 8: three used; shares 1/2, 1/4, 1/4 have entropy 1.5 bits."""
    usage = code_usage(torch.tensor([0, 0, 1, 3]), 8)
    assert usage["codebook_used"] == 3
    assert float(usage["perplexity"]) == pytest.approx(2**1.5)
    assert float(usage["codebook_dead_frac"]) == pytest.approx(5 / 8)


def test_scores_of_an_evaluation_are_those_of_hard_codes(model, pixels):
    scores, soft, hard = dvae_scores(model, pixels, tau=0.5)
    decoded = model.decode(model.encode(pixels))
    torch.testing.assert_close(hard, decoded)
    torch.testing.assert_close(scores["mae"], (decoded - pixels).abs().mean())
    codes = F.one_hot(model.encode(pixels).view(3, 4, 4), 6).permute(0, 3, 1, 2).float()
    mu, log_b = model.reconstruct(codes)
    nats = -logit_laplace_log_prob(map_pixels(pixels), mu, log_b).mean()
    torch.testing.assert_close(scores["recon_loss_hard"], nats.detach())
    assert soft.shape == pixels.shape
    assert 0 <= float(scores["kl"]) <= math.log(6)


@pytest.mark.parametrize(
    ("perplexity", "codes", "warned"),
    [(1.99, 64, True), (2.1, 64, False), (50.0, 8192, True), (100.0, 8192, False)],
)
def test_a_collapsed_codebook_gives_a_warning_with_a_remedy(perplexity, codes, warned):
    warning = collapse_warning({"perplexity": perplexity}, codes)
    assert (warning is not None) == warned
    assert not warned or "raise loss.beta.initial" in warning


def test_the_dvaes_operations_are_those_of_its_convolutions(model, pixels):
    """2 K operations for each output value of a convolution over K inputs, times three with the backward."""
    forward = []

    def count(module, inputs, output):
        forward.append(2 * output.numel() * module.w[0].numel())

    convolutions = [module for module in model.modules() if isinstance(module, Conv2d)]
    hooks = [module.register_forward_hook(count) for module in convolutions]
    model.reconstruct(gumbel_softmax(model.codebook_logits(pixels), 1.0))
    for hook in hooks:
        hook.remove()
    work = DVAEObjective().step_cost(model, pixels)
    assert (work.samples, work.tokens) == (3, 0)
    assert work.flops == 3 * sum(forward) > 0

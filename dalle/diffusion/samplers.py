"""Samplers of diffusion, generator functions over a denoiser: ancestral, DDIM, inversion, DPM-Solver++(2M).

Each yields its steps; the last one's `x` is the sample. A sampler has no random numbers of its own:
`noises(t)` gives the standard normal ones of step t, float32 of the shape of x, which may depend on (seed,
prompt, candidate, t) alone, as those of `dalle.sampling.candidate_normals` do. An error in the arguments is
raised at the first step.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dalle.diffusion.schedule import Denoise, Denoised, Schedule

Noises = Callable[[int], Tensor]


class SamplerStep(NamedTuple):
    """One step of a sampler."""

    t: int
    """The step of the schedule that it starts from."""
    x: Tensor
    """The samples after it: x_{t-1}, of an inversion x_{t+1}."""
    denoised: Denoised
    """What the denoiser found in the samples before it; its `x0` is a preview."""


def noise_of(noises: Noises, t: int, x: Tensor) -> Tensor:
    """The random numbers of a step; ValueError unless they have the shape of the samples."""
    noise = noises(t)
    if noise.shape != x.shape:
        raise ValueError(f"noises({t}) must be {tuple(x.shape)} as the samples, got {tuple(noise.shape)}")
    return noise


@torch.no_grad()
def ancestral(denoise: Denoise, x: Tensor, schedule: Schedule, noises: Noises) -> Iterator[SamplerStep]:
    """Ancestral sampling (DDPM, Algorithm 2) with the denoiser's variance; no noise in the last step.

    Args:
        x: x_T, standard normal.
    """
    for t in reversed(range(len(schedule))):
        found = denoise(x, t)
        x, _ = schedule.posterior(found.x0, x, t)
        if t > 0:
            x = x + (found.log_variance / 2).exp() * noise_of(noises, t, x)
        yield SamplerStep(t, x, found)


@torch.no_grad()
def ddim(
    denoise: Denoise, x: Tensor, schedule: Schedule, noises: Noises | None = None, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """DDIM (Song et al. 2021, Equations 12 and 16).

    Args:
        x: x_T, standard normal.
        noises: not needed for eta 0.
        eta: 0, deterministic, to 1, as much noise as ancestral sampling with small variance.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    if eta > 0 and noises is None:
        raise ValueError(f"DDIM with eta {eta} needs noises; give them or take eta 0")
    a, previous = schedule.alpha_bar.tolist(), schedule.alpha_bar_previous.tolist()
    for t in reversed(range(len(schedule))):
        found = denoise(x, t)
        variance = eta**2 * (1 - previous[t]) / (1 - a[t]) * (1 - a[t] / previous[t])
        x = math.sqrt(previous[t]) * found.x0 + math.sqrt(1 - previous[t] - variance) * found.noise
        if variance > 0:
            x = x + math.sqrt(variance) * noise_of(noises, t, x)
        yield SamplerStep(t, x, found)


@torch.no_grad()
def ddim_invert(denoise: Denoise, x: Tensor, schedule: Schedule) -> Iterator[SamplerStep]:
    """DDIM in reverse, from x_0 to the x_T that `ddim` of eta 0 takes back (DDIM, section 5.4).

    Args:
        x: x_0, which is taken for the samples of step 0.
    """
    following = [*schedule.alpha_bar[1:].tolist(), 0.0]
    for t in range(len(schedule)):
        found = denoise(x, t)
        x = math.sqrt(following[t]) * found.x0 + math.sqrt(1 - following[t]) * found.noise
        yield SamplerStep(t, x, found)


@torch.no_grad()
def dpm_solver(denoise: Denoise, x: Tensor, schedule: Schedule) -> Iterator[SamplerStep]:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): second order with one call of the denoiser per step.

    The first step, without a predecessor, and the last two are of first order, which is DDIM of eta 0: a
    respaced schedule ends with a step of log SNR far longer than the one before, too long to extrapolate.

    Args:
        x: x_T, standard normal.
    """
    alpha, sigma = schedule.alpha.tolist(), schedule.sigma.tolist()
    half_log_snr = (schedule.alpha / schedule.sigma).log().tolist()
    before, h_before = None, 0.0
    for t in reversed(range(len(schedule))):
        found = denoise(x, t)
        if t == 0:
            x = found.x0
        else:
            h, data = half_log_snr[t - 1] - half_log_snr[t], found.x0
            if before is not None and t > 1:
                data = data + (h / h_before / 2) * (data - before)
            x = sigma[t - 1] / sigma[t] * x - alpha[t - 1] * math.expm1(-h) * data
            before, h_before = found.x0, h
        yield SamplerStep(t, x, found)

"""Guidance and constraints of diffusion, wrappers from denoiser to denoiser, for every sampler.

The order of GLIDE's release, from inside out (dalle/pipelines/diffusion.py has known pixels outermost):
classifier-free guidance, known pixels, clipping of x_0, gradient of a classifier or of CLIP:

    score_gradient(clip_x0(keep_known(classifier_free(...), ...), ...), ...)
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from dalle.diffusion.schedule import Denoise, Denoised, Schedule, Steps, check_choice

Shift = Literal["mean", "noise"]
"""What a gradient shifts: the mean of an ancestral step, or the noise of DDIM and DPM-Solver."""


def classifier_free(conditional: Denoise, unconditional: Denoise, scale: float) -> Denoise:
    """Classifier-free guidance (Ho and Salimans 2021): unconditional + scale (conditional - unconditional).

    It extrapolates the noise, and x_0 with it, whatever the prediction. The variance is the conditional one,
    as in GLIDE. A scale of 1 is the conditional denoiser.
    """
    return lambda xt, t: extrapolated(conditional(xt, t), unconditional(xt, t), scale)


def classifier_free_batched(denoise: Denoise, scale: float) -> Denoise:
    """`classifier_free` with one call of a denoiser of 2B rows: B conditional ones, then B unconditional."""

    def guided(xt: Tensor, t: Steps) -> Denoised:
        both = denoise(torch.cat([xt, xt]), t if isinstance(t, int) else torch.cat([t, t]))
        halves = zip(*(part.chunk(2) for part in (both.x0, both.noise, both.log_variance)), strict=True)
        return extrapolated(*(Denoised(*half) for half in halves), scale)

    return guided


def extrapolated(conditional: Denoised, unconditional: Denoised, scale: float) -> Denoised:
    """From the unconditional through the conditional estimate; `scale` is the share of the way."""
    x0 = unconditional.x0 + scale * (conditional.x0 - unconditional.x0)
    noise = unconditional.noise + scale * (conditional.noise - unconditional.noise)
    return Denoised(x0, noise, conditional.log_variance)


def score_gradient(
    denoise: Denoise,
    log_prob: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    scale: float,
    shift: Shift,
) -> Denoise:
    """Guidance by a classifier or by CLIP trained on x_t (Diffusion Beats GANs, Algorithms 1, 2; GLIDE 2.4).

    Args:
        log_prob: of (x_t, times int64 (B,)): (B,), the log probability of a class, or a scaled cosine.
        shift: "mean", by variance * gradient, for `ancestral`; "noise", by -sigma * gradient, for the others.
    """
    check_choice("shift", shift, Shift)
    of_x0, _ = schedule.posterior_weights
    noise_to_x0 = (1 - schedule.alpha_bar) / schedule.alpha

    def guided(xt: Tensor, t: Steps) -> Denoised:
        found = denoise(xt, t)
        with torch.inference_mode(False), torch.enable_grad():
            x = xt.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(log_prob(x, schedule.times_at(t, xt)).sum(), x)
        if shift == "mean":
            per_gradient = found.log_variance.exp() / schedule.at(of_x0, t, xt)
        else:
            per_gradient = schedule.at(noise_to_x0, t, xt)
        return schedule.with_x0(found, found.x0 + scale * per_gradient * gradient, xt, t)

    return guided


def keep_known(denoise: Denoise, known: Tensor, mask: Tensor, schedule: Schedule) -> Denoise:
    """Inpainting: x_0 is replaced by the known pixels where they are, in every step, as GLIDE's samples are.

    Args:
        known: (B, C, H, W), or (1, C, H, W) for all rows.
        mask: (B, 1, H, W) or (1, 1, H, W), 1 where pixels are known and 0 elsewhere.
    """
    if mask.shape[1:] != (1, *known.shape[2:]):
        raise ValueError(f"mask must be (B, 1, H, W) for known {tuple(known.shape)}, got {tuple(mask.shape)}")
    mask = mask.bool()

    def kept(xt: Tensor, t: Steps) -> Denoised:
        if xt.shape[1:] != known.shape[1:]:
            shapes = f"{tuple(xt.shape[1:])}, got {tuple(known.shape[1:])}"
            raise ValueError(f"known pixels must be of the samples' size {shapes}; resize them")
        found = denoise(xt, t)
        return schedule.with_x0(found, torch.where(mask, known, found.x0), xt, t)

    return kept


def clip_x0(denoise: Denoise, schedule: Schedule, limit: float = 1.0) -> Denoise:
    """x_0 clipped to [-limit, limit], and the noise that agrees with it."""

    def clipped(xt: Tensor, t: Steps) -> Denoised:
        found = denoise(xt, t)
        return schedule.with_x0(found, found.x0.clamp(-limit, limit), xt, t)

    return clipped

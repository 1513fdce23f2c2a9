"""Losses of diffusion and the timesteps to train on (Ho et al. 2020, Nichol and Dhariwal 2021).

Losses are per example, (B,), averaged over the dimensions of a sample. Those of the variational bound are for
images of 8 bits, whose values are 2 k / 255 - 1 for k in 0 .. 255.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dalle.diffusion.schedule import Denoise, Denoised, Prediction, Schedule, Steps

VLB_WEIGHT = 0.001
"""Improved DDPM, section 3.1."""


def simple(output: Tensor, target: Tensor) -> Tensor:
    """L_simple: the mean squared error (DDPM, Equation 14)."""
    return (output.float() - target).square().flatten(1).mean(dim=1)


def hybrid(
    schedule: Schedule, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, prediction: Prediction = "noise"
) -> Tensor:
    """L_hybrid = L_simple + 0.001 L_vlb, where L_vlb trains the variance alone (Improved DDPM, Equation 16).

    L_vlb is a sum over the steps, so a term at a uniform t is multiplied by their number. Its unit is bits
    per dimension, as in the published code.

    Args:
        output: (B, 2C, H, W), of a network with a learned variance at x_t.
        x0, noise: (B, C, H, W), of which `schedule.add_noise` made x_t.
        t: int64 (B,).
    """
    if output.shape[1] != 2 * x0.shape[1]:
        raise ValueError(
            f"L_hybrid needs a learned variance, {2 * x0.shape[1]} channels, got {output.shape[1]}; "
            f"train with L_simple"
        )
    mean, v = output.float().chunk(2, dim=1)
    xt = schedule.add_noise(x0, noise, t)
    found = schedule.denoised(torch.cat([mean.detach(), v], dim=1), xt, t, prediction, "learned")
    vlb = len(schedule) * vlb_bits(schedule, found, x0, xt, t)
    return simple(mean, schedule.target(x0, noise, t, prediction)) + VLB_WEIGHT * vlb


def vlb_bits(schedule: Schedule, found: Denoised, x0: Tensor, xt: Tensor, t: Steps) -> Tensor:
    """A term of L_vlb in bits per dimension: L_{t-1}, or L_0 for t = 0 (DDPM, Equations 5 and 13)."""
    true_mean, true_log_variance = schedule.posterior(x0, xt, t)
    mean, _ = schedule.posterior(found.x0, xt, t)
    nats = normal_kl(true_mean, true_log_variance, mean, found.log_variance)
    if isinstance(t, Tensor) or t == 0:
        nll = -discretized_gaussian_log_prob(x0, mean, found.log_variance / 2)
        first = torch.as_tensor(t).to(xt.device, non_blocking=xt.is_cuda) == 0
        nats = torch.where(first.reshape(-1, *[1] * (xt.ndim - 1)), nll, nats)
    return nats.flatten(1).mean(dim=1) / math.log(2)


@torch.no_grad()
def bits_per_dim(denoise: Denoise, x0: Tensor, schedule: Schedule, noises: Callable[[int], Tensor]) -> Tensor:
    """L_vlb: the bound on the negative log likelihood in bits per dimension, (B,); one call per step.

    Args:
        noises: noises(t), standard normal numbers of the shape of x0, of which x_t is made.
    """
    alpha, sigma = schedule.alpha_sigma(len(schedule) - 1, x0)
    zero = torch.zeros_like(x0)
    total = normal_kl(alpha * x0, (2 * sigma.log()).expand_as(x0), zero, zero).flatten(1).mean(dim=1)
    total = total / math.log(2)  # L_T
    for t in range(len(schedule)):
        xt = schedule.add_noise(x0, noises(t), t)
        total = total + vlb_bits(schedule, denoise(xt, t), x0, xt, t)
    return total


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, variance1) || N(mean2, variance2)), elementwise in nats."""
    difference = log_variance1 - log_variance2
    squares = (mean1 - mean2).square() * (-log_variance2).exp()
    return (torch.expm1(difference) - difference + squares) / 2


def discretized_gaussian_log_prob(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of 8-bit values under a Gaussian, elementwise in nats (DDPM, Equation 13).

    A value has the mass of its bin, x +- 1/255; the first and the last bin are open. The published code has
    an approximation of the cumulative distribution in place of the exact one, and a floor of 1e-12.
    """
    inverse = (-log_scale).exp()
    upper, lower = (x - mean + 1 / 255) * inverse, (x - mean - 1 / 255) * inverse
    end = x.abs() > 0.999
    # Right of the mean the bin is mirrored: in the left tail the difference has no cancellation.
    mirrored = torch.where(end, x > 0, upper + lower > 0)
    high = log_ndtr(torch.where(mirrored, -lower, upper))
    low = log_ndtr(torch.where(mirrored, -upper, lower)).masked_fill(end, -torch.inf)
    return high + (-torch.expm1(low - high)).log()


def log_ndtr(z: Tensor) -> Tensor:
    """Log of the standard normal cumulative distribution, by functions that MPS has too."""
    far = z < -1
    tail, right = torch.where(far, z, -1.0), torch.where(far, -1.0, z)  # in range, for the gradient
    of_tail = (torch.special.erfcx(-tail / math.sqrt(2)) / 2).log() - tail.square() / 2
    return torch.where(far, of_tail, torch.log1p(-torch.erfc(right / math.sqrt(2)) / 2))


def stratified_steps(uniform: Tensor, num_steps: int) -> Tensor:
    """Timesteps spread evenly over a batch: row i has one of the i-th of B equal parts; int64 (B,).

    Args:
        uniform: (B,) in [0, 1); over the rows together every step is equally likely.
    """
    share = (torch.arange(len(uniform), device=uniform.device) + uniform) / len(uniform)
    return (share * num_steps).long().clamp(max=num_steps - 1)


class LossHistory(torch.nn.Module):
    """Importance sampling of timesteps for L_vlb (Improved DDPM, section 3.3, Equation 18).

    A step is sampled in proportion to the root mean square of its last 10 losses, mixed with a little of a
    uniform distribution, and uniformly until every step has 10. It is a module, on the CPU, for its
    `state_dict`: a resumed run needs it.
    """

    length = 10
    uniform_share = 0.001

    def __init__(self, num_steps: int):
        super().__init__()
        self.register_buffer("losses", torch.zeros(num_steps, self.length, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_steps, dtype=torch.int64))

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Adds losses (N,) at steps t (N,) of all processes, in order; non-finite ones are left out."""
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            if math.isfinite(loss):
                self.losses[step, int(self.counts[step]) % self.length] = loss
                self.counts[step] += 1

    def probabilities(self) -> Tensor:
        """float64 (T,), sum 1."""
        if (self.counts < self.length).any():
            return torch.full_like(self.losses[:, 0], 1 / len(self.losses))
        size = self.losses.square().mean(dim=1).sqrt()
        return (1 - self.uniform_share) * size / size.sum() + self.uniform_share / len(size)

    def sample(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Steps, int64 (B,), by float64 (B,) in [0, 1), and weights 1 / (T p_t), float32 (B,), of losses."""
        p = self.probabilities()
        t = torch.searchsorted(p.cumsum(dim=0), uniform, right=True).clamp(max=len(p) - 1)
        return t, (1 / (len(p) * p[t])).float()

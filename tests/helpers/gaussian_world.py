"""A world whose denoiser is known: every dimension of every image is N(mean, std^2)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dalle.diffusion.schedule import Denoised, Schedule, Steps


@dataclass(frozen=True)
class GaussianWorld:
    """Denoiser of Gaussian data: x_t ~ N(alpha mean, a std^2 + 1 - a), a = alpha_bar."""

    schedule: Schedule
    mean: float | Tensor
    std: float

    def __call__(self, xt: Tensor, t: Steps) -> Denoised:
        """E[x_0 | x_t], E[noise | x_t] and the variance of the true p(x_{t-1} | x_t)."""
        schedule, a, data = self.schedule, self.schedule.alpha_bar, self.std**2
        of_xt = a * data + 1 - a
        alpha = schedule.at(a.sqrt(), t, xt)
        surprise = (xt - alpha * self.mean) / schedule.at(of_xt, t, xt)
        noise = schedule.at((1 - a).sqrt(), t, xt) * surprise
        left = data * (1 - a) / of_xt  # Var[x_0 | x_t]
        previous = torch.cat([torch.ones(1, dtype=torch.float64), a[:-1]])
        beta = 1 - a / previous
        variance = beta * (1 - previous) / (1 - a) + previous * (beta / (1 - a)).square() * left
        log_variance = schedule.at(variance.log(), t, xt).expand_as(xt)
        return Denoised(self.mean + alpha * data * surprise, noise, log_variance)

    def marginal(self, a: float, z: Tensor) -> Tensor:
        """The x at alpha_bar `a` on the path of the probability flow that is z, standardized, everywhere."""
        return a**0.5 * self.mean + (a * self.std**2 + 1 - a) ** 0.5 * z


def normal_numbers(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float32 numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded_noises(*shape: int):
    """noises(t) of a sampler."""
    return lambda t: normal_numbers(*shape, seed=1000 + t)

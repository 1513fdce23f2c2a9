"""Noise schedules, predictions and the posterior of diffusion (Ho et al. 2020, Nichol and Dhariwal 2021).

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise,    t = 0 .. T - 1

Samples are images (B, C, H, W) in [-1, 1] or embeddings (B, D). Tables are float64 on the CPU, the arithmetic
is float32 on the device of the samples. A step t is an int for all rows, or int64 (B,).

    B batch, T steps, C channels; alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar)
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Steps = int | Tensor
Prediction = Literal["noise", "x0", "v"]
"""What a network predicts: the noise, x_0, or v = alpha noise - sigma x_0 (Salimans and Ho 2022)."""
Variance = Literal["learned", "small", "large"]
"""Variance of a reverse step: from the network, that of the posterior, or beta (DDPM, section 3.2)."""


@dataclass(frozen=True)
class Denoised:
    """What a denoiser finds in x_t. `x0` and `noise` always agree: x_t = alpha x0 + sigma noise."""

    x0: Tensor
    """Estimate of x_0, shape of x_t."""
    noise: Tensor
    """Estimate of the noise, shape of x_t."""
    log_variance: Tensor
    """Log of the variance of p(x_{t-1} | x_t), shape of x_t."""


Denoise = Callable[[Tensor, Steps], Denoised]
"""denoise(x_t, t): what samplers call and guidance wraps."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """The noise of each step, and the time that the network is given."""

    alpha_bar: Tensor
    """float64 (T,), falling, between 1 and 0."""
    times: Tensor
    """int64 (T,): the steps of the schedule that the network was trained with."""

    def __post_init__(self):
        a = self.alpha_bar
        if a.dtype != torch.float64 or a.device.type != "cpu" or a.ndim != 1 or len(a) < 2:
            found = f"{a.dtype} {tuple(a.shape)}"
            raise ValueError(f"alpha_bar must be float64 (T,) on the CPU, T at least 2, got {found}")
        if not (a[-1] > 0 and a[0] < 1 and (a.diff() < 0).all()):
            raise ValueError("alpha_bar must fall from below 1 to above 0; were noises given as signals?")
        if self.times.shape != a.shape:
            raise ValueError(f"times must be {tuple(a.shape)}, one per step, got {tuple(self.times.shape)}")

    def __len__(self) -> int:
        return len(self.alpha_bar)

    @cached_property
    def alpha(self) -> Tensor:
        """Weight of x_0 in x_t."""
        return self.alpha_bar.sqrt()

    @cached_property
    def sigma(self) -> Tensor:
        """Weight of the noise in x_t."""
        return (1 - self.alpha_bar).sqrt()

    @cached_property
    def alpha_bar_previous(self) -> Tensor:
        """alpha_bar of step t - 1, and 1 for t = 0."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])

    @cached_property
    def beta(self) -> Tensor:
        """Variance of q(x_t | x_{t-1}) (DDPM, Equation 2)."""
        return 1 - self.alpha_bar / self.alpha_bar_previous

    @cached_property
    def posterior_weights(self) -> tuple[Tensor, Tensor]:
        """Weights of x_0 and x_t in the mean of q(x_{t-1} | x_t, x_0) (DDPM, Equation 7)."""
        previous, variance = self.alpha_bar_previous, 1 - self.alpha_bar
        of_x0 = previous.sqrt() * self.beta / variance
        return of_x0, (1 - self.beta).sqrt() * (1 - previous) / variance

    @cached_property
    def log_variances(self) -> dict[str, Tensor]:
        """Log variances of a reverse step: "small" (DDPM, Equation 7) and "large"; "beta" is log beta.

        The posterior has no variance at t = 0; there the first two are those of "small" at t = 1.
        """
        small = self.beta * (1 - self.alpha_bar_previous) / (1 - self.alpha_bar)
        small[0] = small[1]
        beta = self.beta.log()
        return {"small": small.log(), "large": torch.cat([small[:1].log(), beta[1:]]), "beta": beta}

    def at(self, table: Tensor, t: Steps, x: Tensor) -> Tensor:
        """Values of a table (T,) at steps t: float32 on the device of x, broadcast over its rows."""
        error = f"steps must be in [0, {len(self)}), the schedule's length, got "
        if isinstance(t, int):
            if not 0 <= t < len(self):
                raise ValueError(f"{error}{t}")
            return torch.full([1] * x.ndim, table[t].item(), dtype=torch.float32, device=x.device)
        try:  # reading the steps to check them would wait
            values = self.placed(table, x.device).index_select(0, t.to(x.device))
        except IndexError:
            raise ValueError(f"{error}{t.tolist()!s:.100}") from None
        return values.reshape(-1, *[1] * (x.ndim - 1))

    def placed(self, table: Tensor, device: torch.device) -> Tensor:
        """A table on a device, float32 for float64, copied there once: a copy in each step would wait."""
        key = id(table), device
        if key not in self._placed:  # the table is kept too, so that no other has its id
            self._placed[key] = table, (table.float() if table.is_floating_point() else table).to(device)
        return self._placed[key][1]

    @cached_property
    def _placed(self) -> dict[tuple[int, torch.device], tuple[Tensor, Tensor]]:
        return {}

    def times_at(self, t: Steps, x: Tensor) -> Tensor:
        """The times that the network is given: int64 (B,) on the device of x."""
        if isinstance(t, int):
            return torch.full([len(x)], self.times[t].item(), device=x.device)
        return self.placed(self.times, x.device)[t.to(x.device)]

    def alpha_sigma(self, t: Steps, x: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at steps t, as `at` gives them."""
        return self.at(self.alpha, t, x), self.at(self.sigma, t, x)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Steps) -> Tensor:
        """x_t of q(x_t | x_0) (DDPM, Equation 4)."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0 + sigma * noise

    def posterior(self, x0: Tensor, xt: Tensor, t: Steps) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(x_{t-1} | x_t, x_0) (DDPM, Equations 6 and 7)."""
        of_x0, of_xt = (self.at(weights, t, xt) for weights in self.posterior_weights)
        return of_x0 * x0 + of_xt * xt, self.at(self.log_variances["small"], t, xt).expand_as(xt)

    def target(self, x0: Tensor, noise: Tensor, t: Steps, prediction: Prediction) -> Tensor:
        """What a network of this prediction should give for x_t."""
        check_choice("prediction", prediction, Prediction)
        alpha, sigma = self.alpha_sigma(t, x0)
        return {"noise": noise, "x0": x0, "v": alpha * noise - sigma * x0}[prediction]

    def denoised(
        self, output: Tensor, xt: Tensor, t: Steps, prediction: Prediction, variance: Variance
    ) -> Denoised:
        """What a network's output says of x_t.

        A learned variance is between "beta" and "small": log variance = f log beta + (1 - f) log of the
        posterior's, f = (v + 1) / 2 (Improved DDPM, Equation 15, with v in [-1, 1] as in its code).

        Args:
            output: shape of xt; with a learned variance twice the channels, (B, 2C, ...), v last.
        """
        check_choice("prediction", prediction, Prediction)
        check_choice("variance", variance, Variance)
        expected = (len(xt), xt.shape[1] * (2 if variance == "learned" else 1), *xt.shape[2:])
        if output.shape != expected:
            raise ValueError(
                f"the network must give {expected} for {variance} variance, got {tuple(output.shape)}; "
                f"was it trained with another variance?"
            )
        output, log = output.float(), self.log_variances
        if variance == "learned":
            output, v = output.chunk(2, dim=1)
            f = (v + 1) / 2
            log_variance = f * self.at(log["beta"], t, xt) + (1 - f) * self.at(log["small"], t, xt)
        else:
            log_variance = self.at(log[variance], t, xt).expand_as(xt)
        alpha, sigma = self.alpha_sigma(t, xt)
        if prediction == "noise":
            return Denoised((xt - sigma * output) / alpha, output, log_variance)
        if prediction == "x0":
            return Denoised(output, (xt - alpha * output) / sigma, log_variance)
        return Denoised(alpha * xt - sigma * output, sigma * xt + alpha * output, log_variance)

    def with_x0(self, found: Denoised, x0: Tensor, xt: Tensor, t: Steps) -> Denoised:
        """`found` with another x0 and the noise that agrees with it."""
        alpha, sigma = self.alpha_sigma(t, xt)
        return Denoised(x0, (xt - alpha * x0) / sigma, found.log_variance)


def check_choice(name: str, value: object, choices: object) -> None:
    """ValueError unless the value is one of a Literal's."""
    if value not in choices.__args__:
        raise ValueError(f"{name} must be one of {', '.join(choices.__args__)}, got {value!r:.100}")


def denoiser(
    network: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    prediction: Prediction = "noise",
    variance: Variance = "learned",
) -> Denoise:
    """The denoiser of a network(x_t, times), times int64 (B,)."""
    return lambda xt, t: schedule.denoised(network(xt, schedule.times_at(t, xt)), xt, t, prediction, variance)


def make_schedule(name: str, num_steps: int = 1000, spacing: str | None = None) -> Schedule:
    """The schedule "linear" (DDPM, section 4) or "cosine" (Improved DDPM, Equation 17), respaced if asked.

    Linear's betas, 1e-4 to 0.02 for 1000 steps, are multiplied by 1000 / num_steps.
    """
    if name == "linear":
        if num_steps <= 20:
            raise ValueError(f"a linear schedule needs more than 20 steps, got {num_steps}; take cosine")
        beta = torch.linspace(1e-4, 0.02, num_steps, dtype=torch.float64) * (1000 / num_steps)
    elif name == "cosine":
        if num_steps < 2:
            raise ValueError(f"a schedule needs at least 2 steps, got {num_steps}")
        share = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        alpha_bar = ((share + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        beta = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"schedule must be linear or cosine, got {name!r:.100}")
    schedule = Schedule((1 - beta).cumprod(dim=0), torch.arange(num_steps))
    return schedule if spacing is None else respace(schedule, spacing)


def respace(schedule: Schedule, spacing: str) -> Schedule:
    """The schedule of some of the steps; the network is given the same times (Improved DDPM, section 4).

    Args:
        spacing: "100", as many evenly spaced steps, both ends included; "10,10,3,2,2", the same in equal
            parts of the schedule, from no noise to most; "fast27", GLIDE's "10,10,3,2,2" with the last step
            moved down by two; "ddim25", as many by a whole stride from 0; "dpm20", even steps of the log of
            the signal-to-noise ratio, for DPM-Solver on small images (Lu et al. 2022, appendix D.1), fewer
            where two fall together.
    """
    numbers = [int(number) for number in re.findall("[0-9]+", spacing)]
    form = re.fullmatch(r"fast27|(?:ddim|dpm)?[0-9]+|[0-9]+(?:,[0-9]+)+", spacing)
    if not form or not all(0 < number <= len(schedule) for number in numbers):
        raise ValueError(
            f"spacing must be like 100, 10,10,3,2,2, ddim25, dpm20 or fast27, with numbers from 1 to the "
            f"schedule's {len(schedule)} steps, got {spacing!r:.100}"
        )
    if spacing == "fast27":
        kept = [*even_steps(len(schedule), [10, 10, 3, 2, 2])[:-1], len(schedule) - 3]
    elif spacing.startswith("ddim"):
        strides = (range(0, len(schedule), stride) for stride in range(1, len(schedule) + 1))
        kept = next((list(steps) for steps in strides if len(steps) == numbers[0]), None)
        if kept is None:
            raise ValueError(f"no whole stride gives {spacing} of {len(schedule)} steps; take another number")
    elif spacing.startswith("dpm"):
        log_snr = torch.logit(schedule.alpha_bar)
        even = torch.linspace(log_snr[-1].item(), log_snr[0].item(), numbers[0], dtype=torch.float64)
        kept = (log_snr - even[:, None]).abs().argmin(dim=1).unique().tolist()
    else:
        kept = even_steps(len(schedule), numbers)
    return Schedule(schedule.alpha_bar[kept], schedule.times[kept])


def even_steps(num_steps: int, counts: list[int]) -> list[int]:
    """Evenly spaced steps, counts[i] of the i-th of equal parts; ValueError if a part has fewer."""
    start, steps = 0, []
    for part, count in enumerate(counts):
        size = num_steps // len(counts) + (part < num_steps % len(counts))
        if count > size:
            raise ValueError(f"the spacing takes {count} of {size} steps; take fewer")
        position = 0.0
        for _ in range(count):  # a sum, for the rounding of the published code
            steps.append(start + round(position))
            position += (size - 1) / max(count - 1, 1)
        start += size
    return steps

"""Noise schedules, predictions and the posterior of diffusion (Ho et al. 2020, Nichol and Dhariwal 2021).

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise,    t = 0 .. T - 1

Samples are images (B, C, H, W) in [-1, 1] or embeddings (B, D). Tables are float64 on the CPU, the arithmetic
is float32 on the device of the samples. A step t is an int for all rows, or int64 (B,).

    B batch, T steps, C channels; alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar)
"""

import math
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
            raise ValueError(
                f"alpha_bar must be float64 (T,) on the CPU, T at least 2, got {a.dtype} {tuple(a.shape)}"
            )
        if not (a[-1] > 0 and a[0] < 1 and (a.diff() < 0).all()):
            raise ValueError("alpha_bar must fall from below 1 to above 0; were noises given as signals?")
        if self.times.shape != a.shape:
            raise ValueError(f"times must be {tuple(a.shape)}, one per step, got {tuple(self.times.shape)}")

    def __len__(self) -> int:
        return len(self.alpha_bar)

    @cached_property
    def alpha_bar_previous(self) -> Tensor:
        """alpha_bar of step t - 1, and 1 for t = 0."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])

    @cached_property
    def beta(self) -> Tensor:
        """Variance of q(x_t | x_{t-1}) (DDPM, Equation 2)."""
        return 1 - self.alpha_bar / self.alpha_bar_previous

    @cached_property
    def log_variances(self) -> dict[str, Tensor]:
        """Log variances of a reverse step: "small" (DDPM, Equation 7) and "large"; "beta" is log beta.

        The posterior has no variance at t = 0; there the first two are those of "small" at t = 1.
        """
        small = self.beta * (1 - self.alpha_bar_previous) / (1 - self.alpha_bar)
        small = torch.cat([small[1:2], small[1:]]).log()
        beta = self.beta.log()
        return {"small": small, "large": torch.cat([small[:1], beta[1:]]), "beta": beta}

    def at(self, table: Tensor, t: Steps, x: Tensor) -> Tensor:
        """Values of a table (T,) at steps t: float32 on the device of x, broadcast over its rows."""
        outside = isinstance(t, int) and not 0 <= t < len(self)
        if isinstance(t, Tensor) and t.device.type == "cpu":  # elsewhere the check would wait
            outside = bool(((t < 0) | (t >= len(self))).any())
        if outside:
            raise ValueError(f"steps must be in [0, {len(self)}), the schedule's length, got {t}")
        if isinstance(t, int):
            return torch.full([1] * x.ndim, table[t].item(), dtype=torch.float32, device=x.device)
        return table.float().to(t.device)[t].to(x.device).reshape(-1, *[1] * (x.ndim - 1))

    def times_at(self, t: Steps, x: Tensor) -> Tensor:
        """The times that the network is given: int64 (B,) on the device of x."""
        if isinstance(t, int):
            return torch.full([len(x)], self.times[t].item(), device=x.device)
        return self.times.to(t.device)[t].to(x.device)

    def alpha_sigma(self, t: Steps, x: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at steps t, as `at` gives them."""
        return self.at(self.alpha_bar.sqrt(), t, x), self.at((1 - self.alpha_bar).sqrt(), t, x)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Steps) -> Tensor:
        """x_t of q(x_t | x_0) (DDPM, Equation 4)."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0 + sigma * noise

    def posterior(self, x0: Tensor, xt: Tensor, t: Steps) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(x_{t-1} | x_t, x_0) (DDPM, Equations 6 and 7)."""
        a, previous, beta = self.alpha_bar, self.alpha_bar_previous, self.beta
        of_x0 = self.at(previous.sqrt() * beta / (1 - a), t, xt)
        of_xt = self.at((1 - beta).sqrt() * (1 - previous) / (1 - a), t, xt)
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
        channels = xt.shape[1] * (2 if variance == "learned" else 1)
        if output.shape != (len(xt), channels, *xt.shape[2:]):
            raise ValueError(
                f"the network must give {(len(xt), channels, *xt.shape[2:])} for {variance} variance, "
                f"got {tuple(output.shape)}; was it trained with another variance?"
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

    def denoise(xt: Tensor, t: Steps) -> Denoised:
        output = network(xt, schedule.times_at(t, xt))
        return schedule.denoised(output, xt, t, prediction, variance)

    return denoise


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
        spacing: as for `spaced_steps`; or "dpm20", even steps of the log of the signal-to-noise ratio, for
            DPM-Solver on small images (Lu et al. 2022, appendix D.1), fewer where two fall together.
    """
    if not spacing.startswith("dpm"):
        kept = spaced_steps(len(schedule), spacing)
    else:
        (count,) = read_numbers(spacing, "dpm", len(schedule), most=1)
        log_snr = torch.logit(schedule.alpha_bar)
        even = torch.linspace(log_snr[-1].item(), log_snr[0].item(), count, dtype=torch.float64)
        kept = (log_snr - even[:, None]).abs().argmin(dim=1).unique().tolist()
    return Schedule(schedule.alpha_bar[kept], schedule.times[kept])


def read_numbers(spacing: str, prefix: str, num_steps: int, most: int) -> list[int]:
    """The numbers of a spacing after its prefix; ValueError unless 1 to `most` of them, in [1, num_steps]."""
    numbers = spacing.removeprefix(prefix).split(",")
    if len(numbers) > most or not all(
        n.isascii() and n.isdigit() and 0 < int(n) <= num_steps for n in numbers
    ):
        raise ValueError(
            f"spacing must be like 100, 10,10,3,2,2, ddim25, dpm20 or fast27, with numbers from 1 to the "
            f"schedule's {num_steps} steps, got {spacing!r:.100}"
        )
    return list(map(int, numbers))


def spaced_steps(num_steps: int, spacing: str) -> list[int]:
    """Steps that a spacing keeps, rising.

    Args:
        spacing: "100", as many evenly spaced steps, both ends included; "10,10,3,2,2", the same in equal
            parts of the schedule, from no noise to most; "ddim25", as many by a whole stride from 0;
            "fast27", GLIDE's "10,10,3,2,2" with the last step moved down by two.
    """
    if spacing == "fast27":
        steps = spaced_steps(num_steps, "10,10,3,2,2")
        return [*steps[:-1], num_steps - 3]
    if spacing.startswith("ddim"):
        (count,) = read_numbers(spacing, "ddim", num_steps, most=1)
        strides = [i for i in range(1, num_steps + 1) if len(range(0, num_steps, i)) == count]
        if not strides:
            raise ValueError(
                f"no whole stride gives {spacing!r:.100} of {num_steps} steps; take another number"
            )
        return list(range(0, num_steps, strides[0]))
    numbers = read_numbers(spacing, "", num_steps, most=num_steps)
    small, larger = divmod(num_steps, len(numbers))
    start, steps = 0, []
    for part, number in enumerate(numbers):
        size = small + (part < larger)
        if number > size:
            raise ValueError(f"spacing {spacing!r:.100} takes {number} of {size} steps; take fewer")
        stride, position = (size - 1) / max(number - 1, 1), 0.0
        for _ in range(number):  # a sum, for the rounding of the published code
            steps.append(start + round(position))
            position += stride
        start += size
    return steps

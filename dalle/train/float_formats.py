"""16-bit float formats 1-6-9 and 0-6-10 (appendices B.2, D, E), emulated by rounding fp32.

The paper keeps Adam's mean and PowerSGD's error buffers and messages in 1-6-9 (sign, exponent and significand
bits) and Adam's variance in 0-6-10: a wider range than fp16's 1-5-10. No hardware has these, so rounding
shows their effect on training and saves no memory.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle.train.distributed import local


@dataclass(frozen=True)
class FloatFormat:
    """A float format as in IEEE 754: hidden bit, subnormals, top exponent for Inf and NaN."""

    exponent: int
    """Bits of the exponent; 2 to 6, so that fp32 holds every value and its reciprocal."""
    significand: int
    """Bits of the significand after the hidden one."""
    bias: int
    """Subtracted from the stored exponent."""
    signed: bool = True
    """Without a sign everything below 0 becomes 0."""

    @property
    def largest(self) -> float:
        """The largest finite value."""
        return (2 - 2.0**-self.significand) * 2.0 ** (2**self.exponent - 2 - self.bias)


MEAN = FloatFormat(6, 9, bias=59)
"""1-6-9. The paper gives its largest value, just under 16 (E.2), and so its bias."""
VARIANCE = FloatFormat(6, 10, bias=60, signed=False)
"""0-6-10. Its bias is not stated: this is the largest that still holds 5, to which B.2 clips the variance."""
HALF = FloatFormat(5, 10, bias=15)
"""fp16, for comparison."""


def rounded(x: Tensor, form: FloatFormat, saturate: bool = False) -> Tensor:
    """The values of a format nearest to fp32 x, ties to even; beyond the largest, Inf.

    With `saturate` values beyond the largest become the largest (E.2, steps 4 and 7).
    """
    x = x if form.signed else x.clamp(min=0)
    _, exponent = torch.frexp(x)  # |x| = f 2^exponent, f in [1/2, 1)
    # log2 of the distance between neighbours
    unit = (exponent - 1).clamp(1 - form.bias, 127) - form.significand
    near = (x * _two_to(-unit)).round() * _two_to(unit)
    near = torch.where(x.isfinite(), near, x)
    if saturate:
        return near.clamp(-form.largest, form.largest)
    return torch.where(near.abs() > form.largest, near * torch.inf, near)


def _two_to(power: Tensor) -> Tensor:
    """2^power as fp32, exact: the bits of the exponent."""
    return ((power.int() + 127) << 23).view(torch.float32)


def store_moments(
    optimizers: Iterable[torch.optim.Optimizer],
    parameters: Iterable[Tensor],
    mean: FloatFormat = MEAN,
    variance: FloatFormat = VARIANCE,
) -> None:
    """Rounds Adam's moments of these parameters after every step; Adam's own arithmetic stays fp32.

    "Most" parameters in the paper: gains, biases and embeddings keep fp32 moments (D, guideline 2). Other
    optimizers than Adam and AdamW are left alone.
    """
    chosen = {id(p) for p in parameters}

    @torch.no_grad()
    def store(optimizer: torch.optim.Optimizer, *_) -> None:
        for parameter, moments in optimizer.state.items():
            if id(parameter) in chosen:
                for name, form in (("exp_avg", mean), ("exp_avg_sq", variance)):
                    held = local(moments[name])
                    held.copy_(rounded(held, form, saturate=True))

    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
            optimizer.register_step_post_hook(store)

"""fp16 gradient underflow with one scale or one per residual block (Section 2.4, Appendix D, Figure 12).

Gradients of a small model spread less than those of a billion parameters, so the study spreads them: a
gradient is multiplied by a power of two on its way into a block and divided by it on its way out. The forward
pass and, in fp32, AdamW's updates stay the same up to rounding. CPU autocast computes in real fp16.

python scripts/studies/fp16_underflow.py --plot underflow.png --plot-scales scales.png --json underflow.json
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from color_tokens import CPU, SMALL, ColorTokens, TrainingStudy, plot_losses
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from dalle.benchmarks.common import finish
from dalle.config import cli_errors, configuration, parse
from dalle.nn.blocks import ResidualBlock, scale_gradient
from dalle.schedules import Schedule
from dalle.train.config import NO_PLATEAU, OptimizerConfig
from dalle.train.grad_scaler import PerBlockGradScaler
from dalle.train.nonfinite import NonfiniteGuard
from dalle.transformer import TransformerConfig
from dalle.viz.curves import scales_figure


class SingleGradScaler(PerBlockGradScaler):
    """The same scale for every resblock, by the rule of torch.amp.GradScaler and its defaults.

    It starts at 2^16, is doubled after 2000 finite updates in a row and halved by each update that is not.
    """

    def __init__(self, resblocks: list[ResidualBlock]):
        super().__init__(resblocks)
        self.values.fill_(2.0**16)
        self.finite_in_a_row = 0

    def update(self, finite: Tensor) -> None:
        """After an update in which these resblocks, bool (blocks,), were finite."""
        self.finite_in_a_row = self.finite_in_a_row + 1 if finite.all() else 0
        if self.finite_in_a_row == 0:
            self.values.mul_(0.5)
        elif self.finite_in_a_row == 2000:
            self.values.mul_(2.0)
            self.finite_in_a_row = 0


PER_BLOCK = "fp16, a scale per resblock"
METHODS: dict[str, Callable[[list[ResidualBlock]], PerBlockGradScaler] | None] = {
    "fp32": None,
    "fp16, one scale": SingleGradScaler,
    PER_BLOCK: PerBlockGradScaler,
}


@configuration
class UnderflowStudy(TrainingStudy):
    """Trains a deep narrow transformer in fp32 and in fp16 with one scale and with a scale per resblock."""

    model: TransformerConfig = replace(SMALL, depth=8, head_dim=16, attention_backend="sdpa")
    grad_exponents: tuple[int, ...] = (*[-22] * 15, 8)
    """log2 of the factor on the gradients of each resblock; beyond 40 their squares leave fp32."""
    steps: int = 3000
    """Updates of each training; a scale grows by one power of two in 1000."""
    batch_size: int = 2
    """Images in an update."""
    plot_scales: Path | None = None
    """File for Figure 12: the scale of each resblock."""


def fp16_underflow(args: UnderflowStudy) -> dict[str, Any]:
    """Trains with every method; losses and shares of zeros are means over the last twentieth of the steps."""
    curves = {method: _train(method, args) for method in METHODS}
    tail = max(1, args.steps // 20)
    results = {
        method: {
            "loss": fmean(line["loss"] for line in lines[-tail:]),
            "skipped": lines[-1]["skipped"],
            "zeros": fmean(fmean(line["zeros"]) for line in lines[-tail:] if "zeros" in line),
        }
        for method, lines in curves.items()
    }
    report = finish({"results": results, "curves": curves}, args.json, CPU)
    if args.plot:
        plot_underflow(curves, tail).savefig(args.plot, dpi=110)
    if args.plot_scales:
        lines = [line for line in curves[PER_BLOCK] if "grad_scale_log2" in line]
        scales_figure(lines).savefig(args.plot_scales, dpi=100)
    return report


def _train(method: str, args: UnderflowStudy) -> list[dict[str, Any]]:
    """A line for each update: step, loss, skipped; each sixtieth of them also zeros and grad_scale_log2."""
    scaler = METHODS[method]
    optimizer = OptimizerConfig(  # independent of the size of gradients
        lr=Schedule(args.lr, args.lr),
        warmup_steps=100,
        eps=1e-18,
        max_grad_norm=None,
        max_variance=None,
        plateau=NO_PLATEAU,
    )
    step = args.stepper("fp16" if scaler else "fp32", optimizer)
    blocks, data = step.model.resblocks(), ColorTokens(args.model.layout, args.seed)
    if scaler:
        step.state.scales = scaler(blocks)
    step.state.extras["nonfinite"] = NonfiniteGuard(limit=8)
    spread_gradients(blocks, args.grad_exponents)
    lines, record_every = [], max(1, args.steps // 60)
    for update in tqdm(range(1, args.steps + 1), desc=method, unit="update", disable=None):
        loss = step(data(range((update - 1) * args.batch_size, update * args.batch_size)))
        line = {
            "step": update,
            "loss": float(loss.total.detach()),
            "skipped": int(loss.metrics["skipped_steps"]),
        }
        if update % record_every == 0:
            line["zeros"] = zero_fractions(blocks)
            if scaler:
                line["grad_scale_log2"] = step.state.scales.values.log2().tolist()
        lines.append(line)
    return lines


def spread_gradients(blocks: Sequence[ResidualBlock], exponents: Sequence[int]) -> None:
    """Multiplies the gradients of each block's parameters by a power of two."""
    for block, exponent in zip(blocks, exponents, strict=True):
        into, out = torch.tensor(2.0**exponent), torch.tensor(2.0**-exponent)
        block.register_forward_pre_hook(lambda _, x, out=out: (scale_gradient(x[0], out), *x[1:]))
        block.register_forward_hook(lambda _, _x, y, into=into: scale_gradient(y, into))


def zero_fractions(blocks: list[nn.Module]) -> list[float]:
    """The fraction of gradient elements of each block that are exactly 0."""
    gradients = [torch.cat([p.grad.flatten() for p in block.parameters()]) for block in blocks]
    return [float((gradient == 0).float().mean()) for gradient in gradients]


def plot_underflow(curves: dict[str, list[dict[str, Any]]], window: int) -> Figure:
    """Losses of each method; then maps of the fractions of zero gradients, resblocks over updates."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, *maps = figure.subplots(1, len(METHODS))
    plot_losses(left, {method: [line["loss"] for line in lines] for method, lines in curves.items()}, window)
    for axis, method in zip(maps, list(METHODS)[1:], strict=True):
        zeros = np.array([line["zeros"] for line in curves[method] if "zeros" in line]).T
        extent = (0, len(curves[method]), len(zeros) + 0.5, 0.5)
        image = axis.imshow(zeros, "magma", vmin=0, vmax=1, aspect="auto", extent=extent)
        axis.set_title(method, fontsize=9)
        axis.set_xlabel("update", fontsize=8)
    figure.colorbar(image, ax=maps, label="fraction of gradient elements that are 0")
    return figure


if __name__ == "__main__":
    with cli_errors():
        fp16_underflow(parse(UnderflowStudy, description=__doc__))

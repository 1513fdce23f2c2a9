"""Underflow in fp16: one gradient scale for a model against one for each resblock (2.4, appendix D, Figure 12).

A small model's gradients do not spread as those of a billion parameters do, so their spread is made: the gradient is
multiplied by a power of two on its way into a resblock and divided by it on its way out. Forward pass and trunk stay as
they are, and so do AdamW's updates, which do not depend on a gradient's size: in fp32 the training is the same with and
without but for rounding (clipping, which would see the size, is off). The last resblock is set apart from all others,
whose gradients need a larger scale than the last one bears; in the paper gradients fall from early to late ones.

Autocast casts to fp16 on any device, so also on a CPU gradients really become 0 or Inf.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dalle.benchmarks.common import Stepper, hardware, save_report
from dalle.benchmarks.studies.powersgd import ColorTokens, check_colors
from dalle.commands.plot import plot_scales, plot_underflow
from dalle.io.files import make_directory
from dalle.nn.blocks import ResidualBlock, scale_gradient
from dalle.schedules import Schedule
from dalle.shapes.dataset import LATTICE
from dalle.train.grad_scaler import PerBlockGradScaler
from dalle.train.lr_schedule import PlateauConfig
from dalle.train.nonfinite import NonfiniteGuard
from dalle.train.optimizer import OptimizerConfig
from dalle.transformer import TransformerConfig
from dalle.transformer.objective import TransformerObjective

LARGEST_POWER = 40
"""Of the factors on gradients: beyond it their squares, AdamW's variance, leave fp32."""


class OneScale(PerBlockGradScaler):
    """The same scale for every resblock, by the law of torch.amp.GradScaler and its defaults.

    It starts at 2^16, is doubled by 2000 finite updates in a row and halved by each that is not.
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


OURS = "fp16, a scale for each resblock"
WAYS: dict[str, Callable[[list[ResidualBlock]], PerBlockGradScaler] | None] = {
    "fp32": None,
    "fp16, one scale": OneScale,
    OURS: PerBlockGradScaler,
}


@dataclass(frozen=True)
class UnderflowBenchmark:
    """Trains a deep narrow transformer, its gradients spread by hand, in fp32 and in fp16 with one and many scales.

    Half an hour on two cores with --processes 3.
    """

    model: TransformerConfig = TransformerConfig(
        depth=8,
        heads=2,
        head_dim=16,
        text_len=18,
        grid=(LATTICE, LATTICE),
        text_vocab=64,
        image_vocab=64,
        init_scale=1.0,
        backend="sdpa",
    )
    """Shape of the transformer; its image tokens are the pixels of a drawn image."""
    powers: tuple[int, ...] = (*[-22] * 15, 8)
    """log2 of the factor on the gradients of each resblock."""
    updates: int = 3000
    """Of each training; a scale grows by one power of two in 1000."""
    batch_size: int = 2
    """Images in an update."""
    lr: float = 2e-3
    """Learning rate of AdamW, after the first 100 updates."""
    seed: int = 0
    """Of weights and images."""
    every: int = 50
    """Updates between two looks at gradients and scales."""
    processes: int = 1
    """Trainings at a time, of the three."""
    image: Path | None = None
    """File for the losses, and for where gradients are zero."""
    scales: Path | None = None
    """File for Figure 12: the scale of each resblock."""
    json: Path | None = None
    """File for the report."""

    def __post_init__(self):
        if min(self.updates, self.batch_size, self.every, self.processes) < 1 or self.every > self.updates:
            raise ValueError(
                "updates, batch-size, every and processes must be positive, and every at most updates; "
                f"got {self.updates}, {self.batch_size}, {self.every} and {self.processes}"
            )
        if len(self.powers) != 2 * self.model.depth or max(map(abs, self.powers)) > LARGEST_POWER:
            raise ValueError(
                f"powers must be one for each of {2 * self.model.depth} resblocks and within {LARGEST_POWER} of 0, so "
                f"that fp32 holds the squares of gradients; got {self.powers}"
            )
        check_colors(self.model)


def benchmark_underflow(run: UnderflowBenchmark) -> dict[str, Any]:
    """Trains in every way; writes --json, --image and --scales.

    Losses and shares of zeros are means over the last twentieth of the updates.
    """
    for path in filter(None, (run.json, run.image, run.scales)):
        make_directory(path.parent)
    if run.processes == 1:
        trained = map(_train, WAYS, repeat(run))
    else:
        with ProcessPoolExecutor(run.processes, mp_context=get_context("spawn")) as pool:
            trained = pool.map(_train, WAYS, repeat(run))
    curves = dict(zip(WAYS, trained, strict=True))
    tail = max(1, run.updates // 20)
    report = {
        "ways": {way: _summary(lines, tail) for way, lines in curves.items()},
        "settings": {name: getattr(run, name) for name in ("powers", "updates", "batch_size", "lr", "seed")}
        | {"width": run.model.width, "depth": run.model.depth},
        "hardware": hardware(torch.device("cpu")),
        "curves": curves,
    }
    save_report(report, run.json)
    if run.image:
        losses = {way: [line["loss"] for line in lines] for way, lines in curves.items()}
        zeros = {way: [line["zeros"] for line in curves[way] if "zeros" in line] for way in WAYS if WAYS[way]}
        plot_underflow(losses, zeros, run.image, smooth=tail)
    if run.scales:
        plot_scales([line for line in curves[OURS] if "grad_scale_log2" in line], run.scales)
    print(
        f"{'':34}loss    skipped  zeros among gradients (means of the last {tail} of {run.updates} updates)"
    )
    for way, line in report["ways"].items():
        print(f"{way:34}{line['loss']:.4f}  {line['skipped']:7d}  {fmean(line['zeros']):.3f}")
    return report


def _train(way: str, run: UnderflowBenchmark) -> list[dict[str, Any]]:
    """A line for each update: step, loss, skipped so far; at every so many zeros and log2 of the scales."""
    precision, cpu = "fp16" if WAYS[way] else "fp32", torch.device("cpu")
    step = Stepper(
        "transformer",
        run.model,
        TransformerObjective(),
        cpu,
        precision,
        optim=optimizer(run.lr),
        seed=run.seed,
    )
    if scales := WAYS[way]:
        step.state.scales = scales(step.model.resblocks())
    step.state.extras["nonfinite"] = NonfiniteGuard(limit=8)
    spread(step.model.resblocks(), run.powers)
    data = ColorTokens(run.model.layout, run.seed)
    lines = []
    for update in tqdm(range(run.updates), desc=way, unit="update", disable=None):
        loss = step(data(range(update * run.batch_size, (update + 1) * run.batch_size)))
        lines.append(
            {"step": update + 1, "loss": float(loss.total.detach()), "skipped": loss.metrics["skipped"]}
        )
        if (update + 1) % run.every == 0:
            lines[-1]["zeros"] = zero_shares(step.model.resblocks())
            if step.state.scales:
                lines[-1]["grad_scale_log2"] = step.state.scales.values.log2().tolist()
    return lines


def optimizer(lr: float) -> OptimizerConfig:
    """AdamW that hardly sees the size of gradients: no clipping, and an eps far below all but noise."""
    return OptimizerConfig(
        lr=Schedule(lr, lr),
        warmup=100,
        eps=1e-18,
        clip=None,
        variance_clip=None,
        plateau=PlateauConfig(halvings=0),
    )


def spread(blocks: Sequence[ResidualBlock], powers: Sequence[int]) -> None:
    """Multiplies the gradients of the parameters of each block, and all within it, by two to such a power."""
    for block, power in zip(blocks, powers, strict=True):
        into, out = torch.tensor(2.0**power), torch.tensor(2.0**-power)
        block.register_forward_pre_hook(
            lambda _, inputs, out=out: (scale_gradient(inputs[0], out), *inputs[1:])
        )
        block.register_forward_hook(lambda _, _inputs, y, into=into: scale_gradient(y, into))


def zero_shares(blocks: list[nn.Module]) -> list[float]:
    """Of each block, the share of the elements of its parameters' gradients that are exactly 0."""
    gradients = [torch.cat([p.grad.flatten() for p in block.parameters()]) for block in blocks]
    return [float((gradient == 0).float().mean()) for gradient in gradients]


def _summary(lines: list[dict[str, Any]], tail: int) -> dict[str, Any]:
    """Means over the last updates, and how many were skipped in all."""
    zeros = [line["zeros"] for line in lines[-tail:] if "zeros" in line] or [
        next(line["zeros"] for line in reversed(lines) if "zeros" in line)
    ]
    return {
        "loss": fmean(line["loss"] for line in lines[-tail:]),
        "skipped": lines[-1]["skipped"],
        "zeros": [fmean(shares) for shares in zip(*zeros, strict=True)],
    }

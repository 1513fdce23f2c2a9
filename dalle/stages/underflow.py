"""Why one gradient scale is not enough: a deep, narrow transformer in fp16 (paper section 2.4, Figures 4 and 12).

Three runs from the same weights over the same streams: fp32; fp16 with one scale for the whole model, by the rules
of torch.amp.GradScaler (halved after an overflow, doubled after 2,000 good updates); and fp16 with the paper's scale
per resblock. Weights start large, and larger with depth, so the gradient grows from each resblock to the one before
it, and spans more powers of two across the model than fp16 has. Where one scale keeps the early resblocks from
overflowing, the gradients of the late ones are flushed to zero.

fp16 is emulated: inputs and outputs of the linear maps inside the resblocks, the gradients of both, and the gradients
of their matrices are rounded to half precision; sums are in fp32, as tensor cores have them.

A scale moves slowly: 2^(1/1000) up, sqrt(2) down in 125 updates. So before the first update the scales are let settle
on the first batch: one scale at the largest power of two that overflows nowhere, those per resblock each at its own
largest, less some headroom. From there on they follow their laws.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle.models import build
from dalle.nn.blocks import Resblock
from dalle.objectives import TransformerObjective
from dalle.stages.measure import hardware, save_report
from dalle.stages.plots import plot_scales, plot_underflow
from dalle.train.ema import AveragedWeights, EMAConfig
from dalle.train.log import JSONLines
from dalle.train.loop import step_numbers, train_step
from dalle.train.optim import OptimizerConfig, build_optimizers
from dalle.train.scaling import HIGHEST, LOWEST, GradientScales, all_finite
from dalle.train.schedules import Schedule
from dalle.train.state import TrainState, make_directory
from dalle.transformer import TransformerConfig
from dalle.types import Loss

DEEP = TransformerConfig(
    depth=24, heads=2, head_width=8, text_len=4, grid=(4, 4), text_vocab=16, image_vocab=16, conv_kernel=3,
    init_scale=8.0, backend="dense",
)  # fmt: skip
RUNS = ("fp32", "one scale", "scale per resblock")
HEADROOM = 2.0**6


@dataclass(frozen=True)
class UnderflowExperiment:
    """Trains a model whose gradients span more than fp16 holds: in fp32, with one gradient scale, with many."""

    out: Path = Path("runs/underflow")
    """Directory for report.json, a log.jsonl of each run, underflow.png and figure12.png."""
    model: TransformerConfig = DEEP
    """Deep and narrow."""
    growth: float = 1.2
    """The last matrix of resblock i starts growth^i larger than `init_scale` says."""
    steps: int = 400
    """Updates of each run."""
    streams: int = 16
    """Random streams to learn by heart, all in every update."""
    step_size: float = 1e-3
    """Of AdamW, without warm-up, decay and clipping."""
    loss_unit: float = 2.0**-18
    """Factor of the loss, as if it were a mean over so many more tokens (the paper's batch has 2^20)."""
    seed: int = 0
    """Of weights and streams."""

    def __post_init__(self):
        if min(self.steps, self.streams) < 1 or not min(self.step_size, self.growth, self.loss_unit) > 0:
            raise ValueError("steps, streams, step-size, growth and loss-unit must be positive")


class OneScale:
    """One scale for all gradients, by the rules of torch.amp.GradScaler; takes the place of GradientScales."""

    def __init__(self, model: nn.Module):
        self.parameters = list(model.parameters())
        self.values = torch.full((1,), 2.0**16)
        self.good_updates = 0

    @torch.no_grad()
    def unscale(self) -> Tensor:
        """Divides every gradient; bool (1,), whether all are finite."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_div_(gradients, self.values[0])
        return all_finite(gradients, self.values.device)[None]

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Halves it, or doubles it after 2,000 good updates."""
        self.good_updates = self.good_updates + 1 if finite.all() else 0
        if not finite.all():
            self.values /= 2
        elif self.good_updates % 2000 == 0:
            self.values *= 2


class Experiment:
    """One of RUNS: a model, its streams, its scales."""

    def __init__(self, run: UnderflowExperiment, name: str):
        torch.manual_seed(run.seed)
        self.run = run
        self.model = model = build("transformer", run.model)
        with torch.no_grad():
            nn.init.normal_(model.to_logits.weight, std=0.02)  # at 0 no resblock would have a gradient to settle on
            for i, block in enumerate(model.resblocks()):
                last_matrix(block).mul_(run.growth**i)
        layout = model.layout
        text = torch.randint(layout.text_vocab, (run.streams, layout.text_len))
        self.ids = layout.pack(text, torch.randint(layout.image_vocab, (run.streams, layout.image_len)))
        self.optim = OptimizerConfig(Schedule(run.step_size, run.step_size), 0, eps=1e-20, weight_decay=0.0, clip=None)
        self.scales = {"fp32": lambda: None, "one scale": lambda: OneScale(model), RUNS[2]: self._per_resblock}[name]()
        self.state = TrainState(
            model, build_optimizers(model, self.optim), AveragedWeights(model, EMAConfig()), self.scales
        )
        if self.scales:
            for block in model.resblocks():
                emulate_half(block)
            self.settle()

    def _per_resblock(self) -> GradientScales:
        return GradientScales(self.model.resblocks())

    def objective(self, model: nn.Module, ids: Tensor, step: int) -> Loss:
        """The transformer's loss in its unit, times the scale where there is but one."""
        loss = TransformerObjective()(model, ids, step)
        scale = self.scales.values[0] if isinstance(self.scales, OneScale) else 1.0
        return Loss(loss.total * self.run.loss_unit * scale, {"nats": loss.total.detach()})

    def settle(self) -> None:
        """Lowers the scales from their highest until nothing overflows on the batch (see the head of this file)."""
        self.scales.values.fill_(HIGHEST)
        for _ in range(1000):
            self.model.zero_grad()
            self.objective(self.model, self.ids, 0).total.backward()
            finite = self.scales.unscale()
            if finite.all():
                break
            self.scales.values.div_(torch.where(finite, 1.0, 2.0))
        if isinstance(self.scales, GradientScales):
            self.scales.values.div_(HEADROOM).clamp_(LOWEST, HIGHEST)

    def step(self) -> dict[str, Any]:
        """One update: what the loop logs, the loss in nats, and what underflowed."""
        loss, norm = train_step(self.state, self.ids, self.objective, self.optim, "fp32", self.run.seed)
        return step_numbers(self.state, loss, norm, self.optim) | {"zero_share": self.zero_shares()}

    def zero_shares(self) -> list[float]:
        """Of each resblock: the share of the gradients of its matrices that is exactly zero."""
        blocks = [[p.grad.flatten() for p in block.f.parameters() if p.ndim == 2] for block in self.model.resblocks()]
        return [float((torch.cat(gradients) == 0).float().mean()) for gradients in blocks]


def last_matrix(block: Resblock) -> Tensor:
    """What writes to the trunk: of attention `out`, of the MLP `project`."""
    return (block.f.out if hasattr(block.f, "out") else block.f.project).weight


class _ThroughHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.half().float()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.half().float()


def emulate_half(block: Resblock) -> None:
    """Rounds inputs and outputs of a resblock's linear maps, their gradients and those of their matrices to fp16."""
    for linear in (module for module in block.f.modules() if isinstance(module, nn.Linear)):
        linear.register_forward_pre_hook(lambda _, inputs: (_ThroughHalf.apply(inputs[0]),))
        linear.register_forward_hook(lambda _, __, output: _ThroughHalf.apply(output))
        linear.weight.register_hook(lambda gradient: gradient.half().float())


def run_underflow(run: UnderflowExperiment) -> dict[str, Any]:
    """Trains all three; writes report.json, a log.jsonl for each, the curves and Figure 12."""
    out = make_directory(run.out)
    lines = {name: _train(run, name, out / name.replace(" ", "-")) for name in RUNS}
    report = {
        "emulation": "linear maps of the resblocks: inputs, outputs, their gradients, matrices' gradients through half",
        "loss_unit": run.loss_unit,
        "final_nats": {name: line[-1]["nats"] for name, line in lines.items()},
        "curves": {name: [(x["step"], x["nats"]) for x in line] for name, line in lines.items()},
        "zero_share_at_the_start": {name: line[0]["zero_share"] for name, line in lines.items()},
        "log2_scales_at_the_start": {name: line[0].get("log2_scales") for name, line in lines.items()},
        "hardware": hardware(torch.device("cpu")),
    }
    save_report(report, out / "report.json")
    plot_underflow(lines, out / "underflow.png")
    plot_scales(out / RUNS[2].replace(" ", "-"), out / "figure12.png")
    return report


def _train(run: UnderflowExperiment, name: str, folder: Path) -> list[dict[str, Any]]:
    experiment, lines = Experiment(run, name), []
    log, every = JSONLines(make_directory(folder) / "log.jsonl", 0), max(1, run.steps // 200)
    for step in range(1, run.steps + 1):
        numbers = experiment.step()
        if step % every == 0 or step == 1:
            log.write(step, numbers)
            lines.append({"step": step, **numbers})
    skipped = sum(line.get("skipped", 0) for line in lines) / len(lines)
    print(f"{name}: {lines[-1]['nats']:.3f} nats after {run.steps} updates, {skipped:.0%} of those logged skipped")
    return lines

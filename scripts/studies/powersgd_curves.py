"""Loss curves of PowerSGD and low-precision optimizer moments (Section 2.5, Appendices B.2 and E).

Replicas are processes that exchange gradients over gloo. All methods start from the same weights.

python scripts/studies/powersgd_curves.py --steps 200 --plot curves.png --json curves.json
"""

from datetime import timedelta
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from color_tokens import CPU, ColorTokens, TrainingStudy, plot_losses
from matplotlib.figure import Figure

from dalle.benchmarks.common import finish
from dalle.config import cli_errors, configuration, parse
from dalle.io.files import read_json, write_json
from dalle.schedules import Schedule
from dalle.train.config import OptimizerConfig
from dalle.train.float_formats import HALF, store_moments
from dalle.train.optimizer import hidden_matrices
from dalle.train.powersgd import PowerSGDConfig, build_powersgd

METHODS: dict[str, tuple[dict[str, str], str]] = {  # settings of PowerSGD, and the format of the moments
    "full gradients": ({}, "fp32"),
    "fixed Q (paper)": ({"q_mode": "fixed"}, "fp32"),
    "warm-started Q": ({"q_mode": "warm_start"}, "fp32"),
    "random Q": ({"q_mode": "random"}, "fp32"),
    "fixed Q, messages and errors 1-6-9": ({"q_mode": "fixed", "message_dtype": "paper"}, "fp32"),
    "moments 1-6-9 and 0-6-10": ({}, "paper"),
    "moments fp16": ({}, "fp16"),
}
METRICS = ("loss", "image_loss", "text_loss", "comm_mb")


@configuration
class PowerSGDStudy(TrainingStudy):
    """Trains a small transformer once with each method."""

    rank: int = 14
    """Rank of the compressed gradients; the paper's is 0.23 of the width."""
    replicas: int = 2
    """Processes that average their gradients."""


def powersgd_curves(args: PowerSGDStudy) -> dict[str, Any]:
    """Trains with every method; the reported losses are means over the last tenth of the steps."""
    with TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_replica, (args, Path(folder)), nprocs=args.replicas)
        curves = read_json(Path(folder) / "curves.json")
    tail = max(1, args.steps // 10)
    results = {
        method: {name: fmean(values[-tail:]) for name, values in metrics.items()}
        for method, metrics in curves.items()
    }
    report = finish({"results": results, "curves": curves}, args.json, CPU)
    if args.plot:
        figure = Figure(figsize=(7, 4), layout="constrained")
        plot_losses(figure.subplots(), {method: curve["loss"] for method, curve in curves.items()}, tail)
        figure.savefig(args.plot, dpi=110)
    return report


def _replica(rank: int, args: PowerSGDStudy, folder: Path) -> None:
    """One process: all trainings in turn; the first one writes the means over the replicas."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), args.replicas)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=args.replicas, timeout=timedelta(minutes=10)
    )
    data = ColorTokens(args.model.layout, args.seed)
    curves = {method: _train(args, data, *settings) for method, settings in METHODS.items()}
    if rank == 0:
        write_json(folder / "curves.json", curves)
    dist.barrier()
    dist.destroy_process_group()


def _train(
    args: PowerSGDStudy, data: ColorTokens, compression: dict[str, str], moments: str
) -> dict[str, list[float]]:
    """The metrics of each update, averaged over the replicas."""
    lr, state_dtype = Schedule(args.lr, args.lr), "paper" if moments == "paper" else "fp32"
    step = args.stepper("fp32", OptimizerConfig(lr, args.steps // 10, state_dtype=state_dtype))
    if moments == "fp16":
        store_moments(step.state.optimizers, [p for _, p in hidden_matrices(step.model)], HALF, HALF)
    powersgd = PowerSGDConfig(args.rank, start_step=0 if compression else args.steps, **compression)
    if averager := build_powersgd(step.model, powersgd, args.seed):
        step.state.extras["powersgd"] = averager
    lines = []
    for update in range(args.steps):
        first = (update * args.replicas + dist.get_rank()) * args.batch_size
        loss = step(data(range(first, first + args.batch_size)))
        values = {"loss": loss.total.detach(), "comm_mb": 0.0, **loss.metrics}
        lines.append([float(values[name]) for name in METRICS])
    means = torch.tensor(lines)
    dist.all_reduce(means)
    return dict(zip(METRICS, (means / args.replicas).T.tolist(), strict=True))


if __name__ == "__main__":
    with cli_errors():
        powersgd_curves(parse(PowerSGDStudy, description=__doc__))

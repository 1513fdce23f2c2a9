"""Loss curves of PowerSGD and low-precision optimizer moments (Section 2.5, Appendices B.2 and E).

Replicas are processes that exchange gradients over gloo. All methods start from the same weights.

python scripts/studies/powersgd_curves.py --steps 200 --plot curves.png --json curves.json
"""

import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from color_tokens import ColorTokens, plot_curves, small_transformer
from matplotlib.figure import Figure

from dalle.benchmarks.common import Stepper, hardware
from dalle.config import cli_errors, parse
from dalle.io.files import read_json, write_json
from dalle.schedules import Schedule
from dalle.train.config import OptimizerConfig
from dalle.train.float_formats import HALF, store_moments
from dalle.train.optimizer import hidden_matrices
from dalle.train.powersgd import PowerSGDConfig, build_powersgd
from dalle.transformer import TransformerConfig
from dalle.transformer.objective import TransformerObjective

METHODS: dict[str, dict[str, str]] = {  # settings of PowerSGD, and the format of the moments
    "full gradients": {},
    "fixed Q (paper)": {"q_mode": "fixed"},
    "warm-started Q": {"q_mode": "warm_start"},
    "random Q": {"q_mode": "random"},
    "fixed Q, messages and errors 1-6-9": {"q_mode": "fixed", "message_dtype": "paper"},
    "moments 1-6-9 and 0-6-10": {"moments": "paper"},
    "moments fp16": {"moments": "fp16"},
}
METRICS = ("loss", "image_loss", "text_loss", "comm_mb")


@dataclass(frozen=True)
class PowerSGDStudy:
    """Trains a small transformer once with each method."""

    model: TransformerConfig = small_transformer(depth=4, head_dim=32, attention_backend="dense")
    """Shape of the transformer; image tokens are the pixels of 12 x 12 images."""
    rank: int = 14
    """Rank of the compressed gradients; the paper's is 0.23 of the width."""
    steps: int = 300
    """Updates of each training."""
    replicas: int = 2
    """Processes that average their gradients."""
    batch_size: int = 16
    """Images in an update, over all replicas."""
    lr: float = 2e-3
    """Learning rate of AdamW, after a warm-up of a tenth of the steps."""
    seed: int = 0
    """Seed of weights, images and Q."""
    plot: Path | None = None
    """File for the curves."""
    json: Path | None = None
    """File for the report."""

    def __post_init__(self):
        if self.batch_size % self.replicas:
            raise ValueError(
                f"batch-size must be a multiple of {self.replicas} replicas, got {self.batch_size}"
            )


def powersgd_curves(args: PowerSGDStudy) -> dict[str, Any]:
    """Trains with every method; the reported losses are means over the last tenth of the steps."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_replica, (args, Path(folder)), nprocs=args.replicas)
        curves = read_json(Path(folder) / "curves.json")
    tail = max(1, args.steps // 10)
    results = {
        method: {name: fmean(values[-tail:]) for name, values in metrics.items()}
        for method, metrics in curves.items()
    }
    report = {"results": results, "hardware": hardware(torch.device("cpu")), "curves": curves}
    if args.json:
        write_json(args.json, report)
    if args.plot:
        losses = {method: metrics["loss"] for method, metrics in curves.items()}
        figure = Figure(figsize=(7, 4), layout="constrained")
        plot_curves(figure.subplots(), "loss", losses, tail)
        figure.savefig(args.plot, dpi=110)
    for method, line in results.items():
        print(f"{method:36}", "  ".join(f"{name} {value:.4f}" for name, value in line.items()))
    return report


def _replica(rank: int, args: PowerSGDStudy, folder: Path) -> None:
    """One process: all trainings in turn; the first one writes the means over the replicas."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), args.replicas)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=args.replicas, timeout=timedelta(minutes=10)
    )
    data = ColorTokens(args.model.layout, args.seed)
    curves = {method: _train(settings, args, data) for method, settings in METHODS.items()}
    if rank == 0:
        write_json(folder / "curves.json", curves)
    dist.barrier()
    dist.destroy_process_group()


def _train(settings: dict[str, str], args: PowerSGDStudy, data: ColorTokens) -> dict[str, list[float]]:
    """The metrics of each update, averaged over the replicas."""
    moments = settings.get("moments", "fp32")
    compression = {name: value for name, value in settings.items() if name != "moments"}
    optim = OptimizerConfig(
        lr=Schedule(args.lr, args.lr),
        warmup_steps=args.steps // 10,
        state_dtype="paper" if moments == "paper" else "fp32",
    )
    cpu = torch.device("cpu")
    step = Stepper(
        "transformer", args.model, TransformerObjective(), cpu, "fp32", optim=optim, seed=args.seed
    )
    if moments == "fp16":
        store_moments(step.state.optimizers, [p for _, p in hidden_matrices(step.model)], HALF, HALF)
    powersgd = PowerSGDConfig(args.rank, start_step=0 if compression else args.steps, **compression)
    if averager := build_powersgd(step.model, powersgd, args.seed):
        step.state.extras["powersgd"] = averager
    share = args.batch_size // args.replicas
    lines = []
    for update in range(args.steps):
        first = update * args.batch_size + dist.get_rank() * share
        loss = step(data(range(first, first + share)))
        values = {"loss": loss.total.detach(), "comm_mb": 0.0, **loss.metrics}
        lines.append([float(values[name]) for name in METRICS])
    means = torch.tensor(lines)
    dist.all_reduce(means)
    return dict(zip(METRICS, (means / args.replicas).T.tolist(), strict=True))


if __name__ == "__main__":
    with cli_errors():
        powersgd_curves(parse(PowerSGDStudy, description=__doc__))

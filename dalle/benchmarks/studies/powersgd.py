"""What compression costs: curves of one small training under every way to average and to store (2.5, B.2, E).

Replicas are processes that send to each other, as in real training. Their data are drawn shapes of twelve by twelve
pixels, whose colors, rounded to 64, are the image tokens; so nothing needs to be trained before.
"""

import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dalle.benchmarks.common import Stepper, hardware, save_report
from dalle.commands.plot import plot_curves
from dalle.io.files import make_directory, read_json, write_json
from dalle.layout import TokenLayout
from dalle.schedules import Schedule
from dalle.shapes.dataset import LATTICE, ShapesDataset, render
from dalle.train.float_formats import HALF, store_moments
from dalle.train.low_rank import PowerSGDConfig
from dalle.train.optimizer import OptimizerConfig, hidden_matrices
from dalle.train.powersgd import build_powersgd
from dalle.transformer import TransformerConfig
from dalle.transformer.objective import TransformerObjective

WAYS: dict[str, dict[str, str]] = {  # settings of PowerSGD, and how moments are stored
    "whole gradients": {},
    "fixed Q (paper)": {"q": "fixed"},
    "updated Q": {"q": "updated"},
    "redrawn Q": {"q": "redrawn"},
    "fixed Q, messages and errors 1-6-9": {"q": "fixed", "formats": "paper"},
    "moments 1-6-9 and 0-6-10": {"moments": "paper"},
    "moments fp16": {"moments": "fp16"},
}
COLORS_OF_CHANNEL = 4


@dataclass(frozen=True)
class CompressionBenchmark:
    """Trains a small transformer once for every way to average gradients and to store moments, at equal steps."""

    model: TransformerConfig = TransformerConfig(
        depth=4,
        heads=2,
        head_dim=32,
        text_len=18,
        grid=(LATTICE, LATTICE),
        text_vocab=64,
        image_vocab=64,
        init_scale=1.0,
        backend="dense",
    )
    """Shape of the transformer; its image tokens are the pixels of a drawn image."""
    rank: int = 14
    """Of the factored gradients; the paper's is 0.23 of the width."""
    steps: int = 300
    """Updates of each training."""
    replicas: int = 2
    """Processes that average their gradients."""
    batch_size: int = 16
    """Images in an update, of all replicas together."""
    lr: float = 2e-3
    """Learning rate of AdamW, after a tenth of the steps."""
    seed: int = 0
    """Of weights, images and Q."""
    image: Path | None = None
    """File for the curves."""
    json: Path | None = None
    """File for the report; printed too."""

    def __post_init__(self):
        if min(self.rank, self.steps, self.replicas, self.batch_size) < 1 or self.batch_size % self.replicas:
            raise ValueError(
                "rank, steps, replicas and batch-size must be positive, and batch-size a multiple of replicas; "
                f"got {self.rank}, {self.steps}, {self.replicas} and {self.batch_size}"
            )
        check_colors(self.model)


def benchmark_compression(run: CompressionBenchmark) -> dict[str, Any]:
    """Trains in every way; writes --json and --image. Losses are means over the last tenth of the steps."""
    for path in filter(None, (run.json, run.image)):
        make_directory(path.parent)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_replica, (run, Path(folder)), nprocs=run.replicas)
        curves = read_json(Path(folder) / "curves.json")
    tail = max(1, run.steps // 10)
    report = {
        "ways": {
            way: {name: fmean(values[-tail:]) for name, values in numbers.items()}
            for way, numbers in curves.items()
        },
        "settings": {
            name: getattr(run, name) for name in ("rank", "steps", "replicas", "batch_size", "lr", "seed")
        }
        | {"width": run.model.width, "depth": run.model.depth},
        "hardware": hardware(torch.device("cpu")),
        "curves": curves,
    }
    save_report(report, run.json)
    if run.image:
        plot_curves(panels(curves), run.image, smooth=tail)
    print(f"{'':36}loss    image nats  text nats  MB sent  (means of the last {tail} of {run.steps} updates)")
    for way, line in report["ways"].items():
        sent = f"{line['comm_mb']:7.2f}"
        print(f"{way:36}{line['loss']:.4f}  {line['image_loss']:.4f}      {line['text_loss']:.4f}    {sent}")
    return report


def panels(curves: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    """The losses, and how far those of factored gradients lie above those of whole ones."""
    losses = {way: numbers["loss"] for way, numbers in curves.items()}
    whole = losses["whole gradients"]
    above = {
        way: [ours - theirs for ours, theirs in zip(values, whole, strict=True)]
        for way, values in losses.items()
        if "q" in WAYS[way]
    }
    return {"loss": losses, "loss above that of whole gradients": above}


def _replica(rank: int, run: CompressionBenchmark, folder: Path) -> None:
    """One process: all trainings in turn; the first one writes what the mean over the replicas was."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), run.replicas)
    patience = timedelta(minutes=10)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=run.replicas, timeout=patience)
    data = ColorTokens(run.model.layout, run.seed)
    curves = {way: _curve(way, run, data) for way in WAYS}
    if rank == 0:
        write_json(folder / "curves.json", curves)
    dist.barrier()
    dist.destroy_process_group()


def _curve(way: str, run: CompressionBenchmark, data: "ColorTokens") -> dict[str, list[float]]:
    """Numbers of each update, means over the replicas."""
    settings = dict(WAYS[way])
    moments = settings.pop("moments", "fp32")
    optim = OptimizerConfig(
        lr=Schedule(run.lr, run.lr), warmup=run.steps // 10, moments="paper" if moments == "paper" else "fp32"
    )
    cpu = torch.device("cpu")
    step = Stepper("transformer", run.model, TransformerObjective(), cpu, "fp32", optim=optim, seed=run.seed)
    if moments == "fp16":
        store_moments(step.state.optimizers, [p for _, p in hidden_matrices(step.model)], HALF, HALF)
    powersgd = PowerSGDConfig(run.rank, start=0 if settings else run.steps, **settings)
    if averager := build_powersgd(step.model, powersgd, run.seed):
        step.state.extras["powersgd"] = averager
    share = run.batch_size // run.replicas
    lines = []
    for update in range(run.steps):
        first = update * run.batch_size + dist.get_rank() * share
        loss = step(data(range(first, first + share)))
        sent = loss.metrics.get("comm_mb", 0.0)
        lines.append(
            [float(loss.total.detach()), *(float(loss.metrics[m]) for m in ("image_loss", "text_loss")), sent]
        )
    means = torch.tensor(lines)
    dist.all_reduce(means)
    names = ("loss", "image_loss", "text_loss", "comm_mb")
    return dict(zip(names, (means / run.replicas).T.tolist(), strict=True))


def check_colors(model: TransformerConfig) -> None:
    """ValueError for a model that cannot read `ColorTokens`."""
    if model.grid != (LATTICE, LATTICE) or model.image_vocab < COLORS_OF_CHANNEL**3:
        raise ValueError(
            f"model needs a grid of {LATTICE} x {LATTICE} and {COLORS_OF_CHANNEL**3} image codes"
        )


class ColorTokens:
    """Joint ids of drawn images: the words of a caption, and the rounded color of each pixel."""

    def __init__(self, layout: TokenLayout, seed: int):
        self.layout, self.pairs = layout, ShapesDataset(16, seed)
        words = sorted(
            {word for texts in self.pairs.captions(range(1000)) for text in texts for word in text.split()}
        )
        self.words = {word: i for i, word in enumerate(words, 1)}  # 0 is any other

    def __call__(self, indices: range) -> Tensor:
        """int64 (B, N) of these images."""
        levels = (render(*self.pairs.drawn(indices), LATTICE) * COLORS_OF_CHANNEL).clip(
            0, COLORS_OF_CHANNEL - 1
        )
        red, green, blue = np.moveaxis(levels.astype(np.int64), 1, 0)  # each (B, 12, 12)
        codes = (red * COLORS_OF_CHANNEL + green) * COLORS_OF_CHANNEL + blue
        texts = [
            [self.words.get(word, 0) for word in texts[0].split()] for texts in self.pairs.captions(indices)
        ]
        text = self.layout.pad_text(texts, truncate=True)
        return self.layout.pack(text, torch.from_numpy(codes.reshape(len(codes), -1)))

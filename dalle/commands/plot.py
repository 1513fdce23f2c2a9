"""Draw the curves of one or many runs, from their log.jsonl, as one image.

python scripts/plot.py runs/transformer
python scripts/plot.py runs/small runs/small-muon --labels AdamW Muon --smooth 0.9 --log-x --out compared.png
python scripts/plot.py runs/transformer --metrics grad_norm lr skipped tokens_per_sec mfu data_time_frac
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure

from dalle.config import cli_errors, parse
from dalle.io.files import make_directory
from dalle.viz.curves import (
    Lines,
    curves_figure,
    label_axis,
    losses_figure,
    names_of,
    read_lines,
    scale_lines,
    scales_figure,
)


@dataclass(frozen=True)
class CurvesImage:
    """Draws curves of runs: a panel for each metric, a color for each run."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Directories of training runs, or their log.jsonl."""
    metrics: tuple[str, ...] = ()
    """Names of log.jsonl, as grad_norm lr tokens_per_sec; the losses of the runs unless given.
    What evaluations measured of the same name (eval/NAME) stands beside as dots."""
    labels: tuple[str, ...] = ()
    """What the runs are called; the names of their directories unless given."""
    smooth: float = 0.0
    """Share of the running mean in each point of training, in [0, 1): 0 draws what was logged, 0.9 is smooth."""
    log_x: bool = False
    """Steps on a logarithmic axis."""
    log_y: bool = False
    """Values on a logarithmic axis."""
    chance: bool = True
    """A dotted line at what a model that knows nothing reaches: ln(vocabulary) for nats a token."""
    out: Path = Path("curves.png")
    """Where the image goes."""

    def __post_init__(self):
        if not 0 <= self.smooth < 1:
            raise ValueError(f"smooth must lie in [0, 1), got {self.smooth}")
        if self.labels and len(self.labels) != len(self.runs):
            raise ValueError(f"{len(self.labels)} labels for {len(self.runs)} runs; give one for each")


def draw_curves(wish: CurvesImage) -> None:
    """Reads the runs and writes the image.

    Raises:
        ValueError: no runs, a run without a log, a metric that no run has (names those that are there).
    """
    if not wish.runs:
        raise ValueError("say which runs to draw: python scripts/plot.py runs/transformer [more runs]")
    names = wish.labels or names_of(wish.runs)
    logs = {name: read_lines(run) for name, run in zip(names, wish.runs, strict=True)}
    figure = curves_figure(logs, wish.metrics, wish.smooth, wish.log_x, wish.log_y, wish.chance)
    make_directory(wish.out.parent)
    figure.savefig(wish.out, dpi=110)
    print(f"wrote {wish.out}")


def plot_losses(runs: dict[str, Path], image: Path) -> None:
    """A row of curves for each run, {kind: directory}, against the step."""
    losses_figure(runs).savefig(image, dpi=110)


@dataclass(frozen=True)
class ScalesImage:
    """Draws Figure 12 for a run in fp16: the gradient scale of each resblock against updates."""

    run: Path = Path("runs/transformer")
    """Directory of the run; its log.jsonl is read."""
    image: Path = Path("scales.png")
    """Where the image goes."""


def draw_scales(wish: ScalesImage) -> None:
    """Reads the run and writes the image."""
    make_directory(wish.image.parent)
    plot_scales(scale_lines(wish.run), wish.image)
    print(f"wrote {wish.image}")


def plot_scales(lines: Lines, image: Path) -> None:
    """Figure 12 of the paper for the log of any run in fp16, see `dalle.viz.scales_image`."""
    scales_figure(lines).savefig(image, dpi=100)


def plot_curves(panels: dict[str, dict[str, list[float]]], image: Path, smooth: int = 1) -> None:
    """Panels beside each other, {title: {name: a value for each update}}, each value a mean over the last `smooth`."""
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    for axis, (title, curves) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        _curves(axis, title, curves, smooth)
    figure.savefig(image, dpi=110)


def plot_underflow(
    losses: dict[str, list[float]], zeros: dict[str, list[list[float]]], path: Path, smooth: int
) -> None:
    """Losses of each way by update; then maps of shares of zeros, (looks, resblocks), over the updates."""
    figure = Figure(figsize=(5 + 3.5 * len(zeros), 3.6), layout="constrained")
    left, *maps = figure.subplots(1, 1 + len(zeros), width_ratios=[5, *[3.5] * len(zeros)])
    _curves(left, "loss", losses, smooth)
    updates = len(next(iter(losses.values())))
    for axis, (way, shares) in zip(maps, zeros.items(), strict=True):
        image = axis.imshow(
            np.transpose(shares),
            cmap="magma",
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="nearest",
            extent=(0, updates, len(shares[0]) + 0.5, 0.5),
        )
        label_axis(axis, way, "update")
        axis.grid(visible=False)
        axis.set_ylabel("resblock, the first above", fontsize=8)
    figure.colorbar(image, ax=maps, label="share of gradient elements that are 0")
    figure.savefig(path, dpi=110)


def _curves(axis: Any, title: str, curves: dict[str, list[float]], smooth: int) -> None:
    """Each value a mean over the last `smooth`; a logarithmic axis where all are positive."""
    for name, values in curves.items():
        means = np.convolve(values, np.full(smooth, 1 / smooth), mode="valid")
        axis.plot(np.arange(smooth, len(values) + 1), means, linewidth=1, label=name)
    if min(map(min, curves.values())) > 0:
        axis.set_yscale("log")
    axis.legend(fontsize=7)
    label_axis(axis, title, "update")


def main() -> None:
    """Command line of plot."""
    with cli_errors():
        draw_curves(parse(CurvesImage, description=__doc__))

"""Curves of runs as one picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from dalle.files import make_directory
from dalle.train.log import read_log

CURVES = {
    "dvae": ["loss", "reconstruction_soft", "perplexity"],
    "transformer": ["image_nats", "text_nats", "eval/image_nats"],
    "clip": ["loss", "picture_to_caption"],
}


def plot_losses(runs: dict[str, Path], picture: Path) -> None:
    """A row of curves for each run, {kind: directory}, against the step."""
    width = max(len(CURVES[kind]) for kind in runs)
    figure = Figure(figsize=(4 * width, 2.6 * len(runs)), layout="constrained")
    axes = figure.subplots(len(runs), width, squeeze=False)
    for row, (kind, folder) in zip(axes, runs.items(), strict=True):
        lines = read_log(folder / "log.jsonl")
        for axis in row[len(CURVES[kind]) :]:
            axis.set_visible(False)
        for axis, name in zip(row, CURVES[kind], strict=False):
            points = [(line["step"], line[name]) for line in lines if name in line]
            axis.plot(*zip(*points, strict=True), linewidth=1)
            _label(axis, f"{kind}: {name}", "step")
    figure.savefig(picture, dpi=110)


@dataclass(frozen=True)
class ScalesPicture:
    """Draws Figure 12 for a run in fp16: the gradient scale of each resblock against updates."""

    run: Path = Path("runs/transformer")
    """Directory of the run; its log.jsonl is read."""
    picture: Path = Path("scales.png")
    """Where the picture goes."""


def draw_scales(wish: ScalesPicture) -> None:
    """Reads the run and writes the picture."""
    make_directory(wish.picture.parent)
    plot_scales(wish.run, wish.picture)
    print(f"wrote {wish.picture}")


def plot_scales(run: Path, picture: Path) -> None:
    """Figure 12 of the paper for any run in fp16: log2 of each resblock's gradient scale against updates.

    Raises:
        ValueError: the run's log has no gradient scales.
    """
    path = run / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"no log {path}; give the directory of a training run")
    lines = [line for line in read_log(path) if "log2_scales" in line]
    if not lines:
        raise ValueError(f"{path} has no gradient scales; only runs with train.precision fp16 have them")
    steps, scales = [line["step"] for line in lines], np.array([line["log2_scales"] for line in lines])
    figure = Figure(figsize=(7, 3), layout="constrained")
    for axis, start, kind in zip(figure.subplots(1, 2, sharey=True), (0, 1), ("attention", "MLP"), strict=True):
        curves = scales[:, start::2].T
        for curve, colour in zip(curves, _shades(len(curves)), strict=True):
            axis.plot(steps, curve, linewidth=0.8, color=colour)
        _label(axis, f"log2 scale, {kind} resblocks: first dark, last bright", "update")
    figure.savefig(picture, dpi=100)


def plot_curves(panels: dict[str, dict[str, list[float]]], picture: Path, smooth: int = 1) -> None:
    """Panels beside each other, {title: {name: a value for each update}}, each value a mean over the last `smooth`."""
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    for axis, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, values in curves.items():
            means = np.convolve(values, np.full(smooth, 1 / smooth), mode="valid")
            axis.plot(np.arange(smooth, len(values) + 1), means, linewidth=1, label=name)
        if min(map(min, curves.values())) > 0:
            axis.set_yscale("log")
        axis.legend(fontsize=7)
        _label(axis, title, "update")
    figure.savefig(picture, dpi=110)


def _shades(count: int) -> Sequence[Any]:
    return colormaps["viridis"](np.linspace(0, 0.95, count))


def _label(axis: Any, title: str, below: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(below, fontsize=8)
    axis.grid(alpha=0.3)

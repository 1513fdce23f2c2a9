"""Training curves and gradient scales per residual block (Figure 12), from the log.jsonl of runs."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from dalle.train.loggers import read_log

CURVES = {
    "dvae": ["loss", "recon_loss", "perplexity"],
    "transformer": ["loss", "image_loss", "text_loss"],
    "clip": ["loss", "image_to_text_acc"],
    "base": ["loss", "mse", "bits_per_dim"],
    "upsampler": ["loss", "mse", "bits_per_dim"],
}
"""Metrics plotted by default, by the kind of model that a run trains."""
MAX_VALUE = 1e100  # of a plotted value; JSON may hold integers beyond any float
Lines = list[dict[str, Any]]


def figure_image(figure: Figure, dpi: int = 110) -> Image.Image:
    """A matplotlib figure as an RGB image."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return Image.open(buffer, formats=["PNG"]).convert("RGB")


def plot_curves(
    runs: Mapping[str, Path] | Sequence[Path],
    metrics: Sequence[str] = (),
    smooth: float = 0.0,
    log_x: bool = False,
    log_y: bool = False,
    chance: bool = True,
) -> Image.Image:
    """A panel for each metric, a color for each run; ValueError for a metric that no run has.

    Args:
        runs: directories of training runs, or their log.jsonl; a mapping gives them names.
        metrics: names in log.jsonl; by default the losses of the runs. Validation values (val/NAME) are dots.
        smooth: weight of the previous average in the moving average of training values, in [0, 1).
        chance: a dotted line at the value of an uninformed model.
    """
    if not isinstance(runs, Mapping):
        names = [(run.parent if run.suffix == ".jsonl" else run).resolve().name for run in runs]
        runs = dict(zip(names if len(set(names)) == len(names) else map(str, runs), runs, strict=True))
    logs = {name: read_lines(run) for name, run in runs.items()}
    logged = {name for lines in logs.values() for line in lines for name in line} - {"step"}
    known = dict.fromkeys(name for names in CURVES.values() for name in names)
    chosen = list(metrics) or [name for name in known if name in logged]
    if unknown := [name for name in chosen if name not in logged]:
        raise ValueError(f"no run has {unknown[0]!r} in its log; there are {', '.join(sorted(logged))}")
    if not chosen:
        raise ValueError("the logs are empty: no step is logged yet")
    figure = metrics_figure([(name, name, logs) for name in chosen], smooth, chance)
    for axis in figure.axes:
        axis.set_xscale("log" if log_x else "linear")
        axis.set_yscale("log" if log_y else "linear")
    if len(logs) > 1:
        figure.axes[0].legend(fontsize=7)
    return figure_image(figure)


def plot_losses(runs: Mapping[str, Path]) -> Image.Image:
    """A panel for each loss of each run, {kind: directory} of "dvae", "transformer", "clip"."""
    logs = {kind: {kind: read_lines(folder)} for kind, folder in runs.items()}
    panels = [(f"{kind}: {name}", name, logs[kind]) for kind in runs for name in CURVES[kind]]
    return figure_image(metrics_figure(panels))


def metrics_figure(
    panels: Sequence[tuple[str, str, Mapping[str, Lines]]], smooth: float = 0.0, chance: bool = True
) -> Figure:
    """Three panels a row, each (title, metric, {run: log}): training as a line, validation as dots."""
    columns, rows = min(3, len(panels)), -(-len(panels) // 3)
    figure = Figure(figsize=(4.5 * columns, 3.2 * rows), layout="constrained")
    for number, (title, name, logs) in enumerate(panels):
        axis = figure.add_subplot(rows, columns, number + 1)
        for run, (label, lines) in enumerate(logs.items()):
            color = f"C{run % 10}"
            if trained := metric_points(lines, name):
                steps, values = zip(*trained, strict=True)
                style = "o-" if len(trained) < 16 else "-"
                axis.plot(steps, smoothed(values, smooth), style, ms=3, lw=1, color=color, label=label)
            if measured := metric_points(lines, f"val/{name}"):
                axis.plot(*zip(*measured, strict=True), "o--", ms=3, lw=0.6, color=color)
            if chance and (known := metric_points(lines, f"baseline/{name}")):
                axis.axhline(known[0][1], linestyle=":", lw=1, color=color)
        label_axis(axis, title, "step")
    return figure


def plot_gradient_scales(run: Path) -> Image.Image:
    """Figure 12 for a run in fp16: log2 of each resblock's gradient scale; ValueError for other runs."""
    lines = [line for line in read_lines(run) if _has_scales(line)]
    if not lines:
        raise ValueError(f"{run} has no gradient scales; only runs with train.precision fp16 have them")
    return figure_image(scales_figure(lines), dpi=100)


def _has_scales(line: dict[str, Any]) -> bool:
    scales = line.get("grad_scale_log2")
    numbers = [line["step"], *scales] if isinstance(scales, list) else [None]
    return all(isinstance(one, int | float) and abs(one) < MAX_VALUE for one in numbers)


def scales_figure(lines: Lines) -> Figure:
    """The figure of `plot_gradient_scales` from log lines that all hold grad_scale_log2."""
    steps, scales = [line["step"] for line in lines], np.array([line["grad_scale_log2"] for line in lines])
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for start, kind in enumerate(("attention", "MLP")):
        curves = scales[:, start::2].T
        for curve, color in zip(curves, colormaps["viridis"](np.linspace(0, 0.95, len(curves))), strict=True):
            axes[start].plot(steps, curve, linewidth=0.8, color=color)
        label_axis(axes[start], f"log2 scale, {kind} resblocks: first dark, last bright", "step")
    return figure


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average with bias correction: `weight` is that of the previous average."""
    means, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        means.append(total / norm)
    return means


def metric_points(lines: Lines, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric, where the log has a finite one."""
    points = [(line["step"], line.get(name)) for line in lines]
    return [p for p in points if all(isinstance(one, int | float) and abs(one) < MAX_VALUE for one in p)]


def read_lines(run: Path) -> Lines:
    """The log of a run's directory, or of its log.jsonl; ValueError where there is none."""
    path = run if run.suffix == ".jsonl" else run / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"no log {path}; give the directory of a training run")
    return read_log(path)


def label_axis(axis: Any, title: str, x_label: str) -> None:
    """Title, label of the horizontal axis, and a pale grid."""
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(x_label, fontsize=8)
    axis.grid(alpha=0.3)

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
}
"""Metrics plotted by default, by the kind of model that a run trains."""
Lines = list[dict[str, Any]]


def figure_image(figure: Figure, dpi: int = 110) -> Image.Image:
    """A matplotlib figure as an RGB image."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return Image.open(buffer).convert("RGB")


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
    named = runs if isinstance(runs, Mapping) else dict(zip(run_names(runs), runs, strict=True))
    logs = {name: read_lines(run) for name, run in named.items()}
    logged = {name for lines in logs.values() for line in lines for name in line} - {"step"}
    known = dict.fromkeys(name for names in CURVES.values() for name in names)
    chosen = list(metrics) or [name for name in known if name in logged]
    if unknown := [name for name in chosen if name not in logged]:
        raise ValueError(f"no run has {unknown[0]!r} in its log; there are {', '.join(sorted(logged))}")
    if not chosen:
        raise ValueError("the logs are empty: no step is logged yet")
    figure = Figure(figsize=(4.5 * min(3, len(chosen)), 3.2 * -(-len(chosen) // 3)), layout="constrained")
    for number, name in enumerate(chosen, 1):
        axis = figure.add_subplot(-(-len(chosen) // 3), min(3, len(chosen)), number)
        _plot_metric(axis, logs, name, smooth, chance)
        axis.set_xscale("log" if log_x else "linear")
        axis.set_yscale("log" if log_y else "linear")
    if len(logs) > 1:
        figure.axes[0].legend(fontsize=7)
    return figure_image(figure)


def plot_losses(runs: Mapping[str, Path]) -> Image.Image:
    """A row of curves for each run, {kind: directory} of "dvae", "transformer", "clip"."""
    width = max(len(CURVES[kind]) for kind in runs)
    figure = Figure(figsize=(4 * width, 2.6 * len(runs)), layout="constrained")
    for row, (kind, folder) in enumerate(runs.items()):
        logs = {kind: read_lines(folder)}
        for column, name in enumerate(CURVES[kind], 1):
            axis = figure.add_subplot(len(runs), width, row * width + column)
            _plot_metric(axis, logs, name, title=f"{kind}: {name}")
    return figure_image(figure)


def plot_gradient_scales(run: Path) -> Image.Image:
    """Figure 12 for a run in fp16: log2 of each resblock's gradient scale; ValueError for other runs."""
    lines = [line for line in read_lines(run) if isinstance(line.get("grad_scale_log2"), list)]
    if not lines:
        raise ValueError(f"{run} has no gradient scales; only runs with train.precision fp16 have them")
    return figure_image(scales_figure(lines), dpi=100)


def scales_figure(lines: Lines) -> Figure:
    """The figure of `plot_gradient_scales` from log lines that all hold grad_scale_log2."""
    steps, scales = [line["step"] for line in lines], np.array([line["grad_scale_log2"] for line in lines])
    figure = Figure(figsize=(7, 3), layout="constrained")
    for start, axis in enumerate(figure.subplots(1, 2, sharey=True)):
        curves = scales[:, start::2].T
        for curve, color in zip(curves, colormaps["viridis"](np.linspace(0, 0.95, len(curves))), strict=True):
            axis.plot(steps, curve, linewidth=0.8, color=color)
        kind = ("attention", "MLP")[start]
        label_axis(axis, f"log2 scale, {kind} resblocks: first dark, last bright", "step")
    return figure


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average with bias correction: `weight` is that of the previous average."""
    means, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        means.append(total / norm)
    return means


def metric_points(lines: Lines, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric, where the log has it."""
    return [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]


def read_lines(run: Path) -> Lines:
    """The log of a run's directory, or of its log.jsonl; ValueError where there is none."""
    path = run if run.suffix == ".jsonl" else run / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"no log {path}; give the directory of a training run")
    return read_log(path)


def run_names(runs: Sequence[Path]) -> list[str]:
    """Names of directories; whole paths where two have the same name."""
    names = [(run.parent if run.suffix == ".jsonl" else run).resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def label_axis(axis: Any, title: str, x_label: str) -> None:
    """Title, label of the horizontal axis, and a pale grid."""
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(x_label, fontsize=8)
    axis.grid(alpha=0.3)


def _plot_metric(
    axis: Any, logs: Mapping[str, Lines], name: str, smooth: float = 0.0, chance: bool = True, title: str = ""
) -> None:
    """One metric of every run that has it: training as a line, validation as dots, chance dotted."""
    for number, (label, lines) in enumerate(logs.items()):
        color = f"C{number % 10}"
        if trained := metric_points(lines, name):
            steps, values = zip(*trained, strict=True)
            axis.plot(steps, smoothed(values, smooth), linewidth=1, color=color, label=label)
        if measured := metric_points(lines, f"val/{name}"):
            axis.plot(*zip(*measured, strict=True), "o--", markersize=3, linewidth=0.6, color=color)
        if chance and (known := metric_points(lines, f"baseline/{name}")):
            axis.axhline(known[0][1], linestyle=":", linewidth=1, color=color)
    label_axis(axis, title or name, "step")

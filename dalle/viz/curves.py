"""Curves of runs and the gradient scales of resblocks, from their log.jsonl."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from dalle.train.loggers import read_log
from dalle.viz.figures import figure_image

CURVES = {
    "dvae": ["loss", "recon_loss", "perplexity"],
    "transformer": ["loss", "image_loss", "text_loss"],
    "clip": ["loss", "image_to_text_acc"],
}
METRICS = list(dict.fromkeys(name for names in CURVES.values() for name in names))
"""What is drawn unless told: of these, those that a run has."""
Lines = list[dict[str, Any]]


def curves_image(
    runs: Mapping[str, Path] | Sequence[Path], metrics: Sequence[str] = (), **settings
) -> Image.Image:
    """A panel for each metric, a color for each run.

    Args:
        runs: directories of training runs, or their log.jsonl, perhaps by the name that each shall have.
        metrics, settings: as `curves_figure`.
    """
    named = runs if isinstance(runs, Mapping) else dict(zip(names_of(runs), runs, strict=True))
    return figure_image(
        curves_figure({name: read_lines(Path(run)) for name, run in named.items()}, metrics, **settings)
    )


def curves_figure(
    logs: Mapping[str, Lines],
    metrics: Sequence[str] = (),
    smooth: float = 0.0,
    log_x: bool = False,
    log_y: bool = False,
    chance: bool = True,
) -> Figure:
    """The figure of `curves_image`.

    Args:
        logs: the lines of each run's log (`read_lines`), by its name.
        metrics: names of log.jsonl; the losses of the runs unless given. What evaluations measured of the same name
            (eval/NAME) stands beside as dots.
        smooth: share of the running mean in each point of training, in [0, 1).
        log_x, log_y: logarithmic axes.
        chance: a dotted line at what a model that knows nothing reaches.

    Raises:
        ValueError: a metric that no run has (names those that are there), or logs without a line.
    """
    there = {name for lines in logs.values() for line in lines for name in line} - {"step"}
    chosen = list(metrics) or [name for name in METRICS if name in there]
    if unknown := [name for name in chosen if name not in there]:
        raise ValueError(f"no run has {unknown[0]!r} in its log; there are {', '.join(sorted(there))}")
    if not chosen:
        raise ValueError("the logs are empty: no update was logged yet")
    figure = Figure(figsize=(4.5 * min(3, len(chosen)), 3.2 * -(-len(chosen) // 3)), layout="constrained")
    axes = figure.subplots(-(-len(chosen) // 3), min(3, len(chosen)), squeeze=False).flatten()
    for axis, name in zip(axes, chosen, strict=False):
        _panel(axis, logs, name, smooth, chance)
        axis.set_xscale("log" if log_x else "linear")
        axis.set_yscale("log" if log_y else "linear")
    for axis in axes[len(chosen) :]:
        axis.set_visible(False)
    if len(logs) > 1:
        axes[0].legend(fontsize=7)
    return figure


def losses_image(runs: Mapping[str, Path]) -> Image.Image:
    """A row of curves for each run, {kind: directory} of "dvae", "transformer", "clip"."""
    return figure_image(losses_figure(runs))


def losses_figure(runs: Mapping[str, Path]) -> Figure:
    """The figure of `losses_image`."""
    width = max(len(CURVES[kind]) for kind in runs)
    figure = Figure(figsize=(4 * width, 2.6 * len(runs)), layout="constrained")
    axes = figure.subplots(len(runs), width, squeeze=False)
    for row, (kind, folder) in zip(axes, runs.items(), strict=True):
        logs = {kind: read_lines(folder)}
        for axis in row[len(CURVES[kind]) :]:
            axis.set_visible(False)
        for axis, name in zip(row, CURVES[kind], strict=False):
            _panel(axis, logs, name, title=f"{kind}: {name}")
    return figure


def scales_image(run: Path) -> Image.Image:
    """Figure 12 of the paper for any run in fp16: log2 of each resblock's gradient scale against updates.

    Raises:
        ValueError: the run's log has no gradient scales.
    """
    return figure_image(scales_figure(scale_lines(run)), dpi=100)


def scale_lines(run: Path) -> Lines:
    """The lines of a run's log that have gradient scales; ValueError where none has."""
    lines = [line for line in read_lines(Path(run)) if isinstance(line.get("grad_scale_log2"), list)]
    if not lines:
        raise ValueError(f"{run} has no gradient scales; only runs with train.precision fp16 have them")
    return lines


def scales_figure(lines: Lines) -> Figure:
    """The figure of `scales_image`, of such lines."""
    steps, scales = [line["step"] for line in lines], np.array([line["grad_scale_log2"] for line in lines])
    figure = Figure(figsize=(7, 3), layout="constrained")
    for axis, start, kind in zip(
        figure.subplots(1, 2, sharey=True), (0, 1), ("attention", "MLP"), strict=True
    ):
        curves = scales[:, start::2].T
        for curve, color in zip(curves, _shades(len(curves)), strict=True):
            axis.plot(steps, curve, linewidth=0.8, color=color)
        label_axis(axis, f"log2 scale, {kind} resblocks: first dark, last bright", "update")
    return figure


def smoothed(values: Sequence[float], share: float) -> list[float]:
    """Running means, corrected for their start: each is `share` of the mean before and the rest of the new value."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = share * total + (1 - share) * value, share * weight + (1 - share)
        means.append(total / weight)
    return means


def points(lines: Lines, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric, where the log has it."""
    return [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]


def read_lines(run: Path) -> Lines:
    """The log of a run's directory, or of its log.jsonl; ValueError where there is none."""
    path = run if run.suffix == ".jsonl" else run / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"no log {path}; give the directory of a training run")
    return read_log(path)


def names_of(runs: Sequence[Path]) -> list[str]:
    """Names of directories; whole paths where two are named alike."""
    names = [(run.parent if run.suffix == ".jsonl" else run).resolve().name for run in map(Path, runs)]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def label_axis(axis: Any, title: str, below: str) -> None:
    """A title and what the horizontal axis counts, over pale lines."""
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(below, fontsize=8)
    axis.grid(alpha=0.3)


def _panel(
    axis: Any,
    logs: Mapping[str, Lines],
    name: str,
    smooth: float = 0.0,
    chance: bool = True,
    title: str | None = None,
) -> None:
    """One metric of every run that has it: training as a line, evaluations as dots, chance dotted."""
    for number, (label, lines) in enumerate(logs.items()):
        color = f"C{number % 10}"
        if trained := points(lines, name):
            steps, values = zip(*trained, strict=True)
            axis.plot(steps, smoothed(values, smooth), linewidth=1, color=color, label=label)
        if measured := points(lines, f"eval/{name}"):
            axis.plot(*zip(*measured, strict=True), "o--", markersize=3, linewidth=0.6, color=color)
        if chance and (known := points(lines, f"chance/{name}")):
            axis.axhline(known[0][1], linestyle=":", linewidth=1, color=color)
    label_axis(axis, title or name, "step")


def _shades(count: int) -> Sequence[Any]:
    return colormaps["viridis"](np.linspace(0, 0.95, count))

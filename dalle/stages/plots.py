"""Curves of one or many runs as one picture, from their log.jsonl."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure

from dalle.files import make_directory
from dalle.train.log import read_log

CURVES = {
    "dvae": ["loss", "reconstruction_soft", "perplexity"],
    "transformer": ["loss", "image_nats", "text_nats"],
    "clip": ["loss", "picture_to_caption"],
}
METRICS = list(dict.fromkeys(name for names in CURVES.values() for name in names))
"""What is drawn unless told: of these, those that a run has."""


@dataclass(frozen=True)
class CurvesPicture:
    """Draws curves of runs: a panel for each metric, a colour for each run."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Directories of training runs, or their log.jsonl."""
    metrics: tuple[str, ...] = ()
    """Names of log.jsonl, as gradient_norm step_size tokens_per_second; the losses of the runs unless given.
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
    """Where the picture goes."""

    def __post_init__(self):
        if not 0 <= self.smooth < 1:
            raise ValueError(f"smooth must lie in [0, 1), got {self.smooth}")
        if self.labels and len(self.labels) != len(self.runs):
            raise ValueError(f"{len(self.labels)} labels for {len(self.runs)} runs; give one for each")


Lines = list[dict[str, Any]]


def draw_curves(wish: CurvesPicture) -> None:
    """Reads the runs and writes the picture.

    Raises:
        ValueError: no runs, a run without a log, a metric that no run has (names those that are there).
    """
    if not wish.runs:
        raise ValueError("say which runs to draw: python scripts/plot.py runs/transformer [more runs]")
    names = wish.labels or _labels(wish.runs)
    logs = {name: _lines(run) for name, run in zip(names, wish.runs, strict=True)}
    there = {name for lines in logs.values() for line in lines for name in line} - {"step"}
    metrics = list(wish.metrics) or [name for name in METRICS if name in there]
    if unknown := [name for name in metrics if name not in there]:
        raise ValueError(f"no run has {unknown[0]!r} in its log; there are {', '.join(sorted(there))}")
    if not metrics:
        raise ValueError("the logs are empty: no update was logged yet")
    make_directory(wish.out.parent)
    figure = Figure(figsize=(4.5 * min(3, len(metrics)), 3.2 * -(-len(metrics) // 3)), layout="constrained")
    axes = figure.subplots(-(-len(metrics) // 3), min(3, len(metrics)), squeeze=False).flatten()
    for axis, name in zip(axes, metrics, strict=False):
        _panel(axis, logs, name, wish)
    for axis in axes[len(metrics) :]:
        axis.set_visible(False)
    if len(logs) > 1:
        axes[0].legend(fontsize=7)
    figure.savefig(wish.out, dpi=110)
    print(f"wrote {wish.out}")


def plot_losses(runs: dict[str, Path], picture: Path) -> None:
    """A row of curves for each run, {kind: directory}, against the step."""
    width = max(len(CURVES[kind]) for kind in runs)
    figure = Figure(figsize=(4 * width, 2.6 * len(runs)), layout="constrained")
    axes = figure.subplots(len(runs), width, squeeze=False)
    for row, (kind, folder) in zip(axes, runs.items(), strict=True):
        logs = {kind: _lines(folder)}
        for axis in row[len(CURVES[kind]) :]:
            axis.set_visible(False)
        for axis, name in zip(row, CURVES[kind], strict=False):
            _panel(axis, logs, name, CurvesPicture(), f"{kind}: {name}")
    figure.savefig(picture, dpi=110)


def _panel(axis: Any, logs: dict[str, Lines], name: str, wish: CurvesPicture, title: str | None = None) -> None:
    """One metric of every run that has it: training as a line, evaluations as dots, chance dotted."""
    for number, (label, lines) in enumerate(logs.items()):
        colour = f"C{number % 10}"
        if trained := _points(lines, name):
            steps, values = zip(*trained, strict=True)
            axis.plot(steps, smoothed(values, wish.smooth), linewidth=1, color=colour, label=label)
        if measured := _points(lines, f"eval/{name}"):
            axis.plot(*zip(*measured, strict=True), "o--", markersize=3, linewidth=0.6, color=colour)
        if wish.chance and (known := _points(lines, f"chance/{name}")):
            axis.axhline(known[0][1], linestyle=":", linewidth=1, color=colour)
    if wish.log_x:
        axis.set_xscale("log")
    if wish.log_y:
        axis.set_yscale("log")
    _label(axis, title or name, "step")


def smoothed(values: Sequence[float], share: float) -> list[float]:
    """Running means, corrected for their start: each is `share` of the mean before and the rest of the new value."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = share * total + (1 - share) * value, share * weight + (1 - share)
        means.append(total / weight)
    return means


def _points(lines: Lines, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]


def _lines(run: Path) -> Lines:
    path = run if run.suffix == ".jsonl" else run / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"no log {path}; give the directory of a training run")
    return read_log(path)


def _labels(runs: Sequence[Path]) -> list[str]:
    """Names of directories; whole paths where two are named alike."""
    names = [(run.parent if run.suffix == ".jsonl" else run).resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


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
    lines = [line for line in _lines(run) if "log2_scales" in line]
    if not lines:
        raise ValueError(f"{run} has no gradient scales; only runs with train.precision fp16 have them")
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

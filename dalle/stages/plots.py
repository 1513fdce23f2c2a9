"""Curves of runs as one picture."""

from pathlib import Path

from matplotlib.figure import Figure

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
            axis.set_title(f"{kind}: {name}", fontsize=9)
            axis.set_xlabel("step", fontsize=8)
            axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)

"""Learning rate sweep: the same short training at several multiples of the configured rate.

python scripts/lr_sweep.py 0.25 0.5 1 2 4 --config configs/transformer/shapes.yaml --steps 100
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from statistics import fmean

from dalle.config import cli_errors, parse
from dalle.help import overview
from dalle.runs.kinds import EACH_KIND, TRAININGS, take_kind
from dalle.train.config import TrainArgs


def sweep(kind: str, run: TrainArgs, factors: Sequence[float]) -> dict[float, float]:
    """Trains once for each factor into <out>/lr-<learning rate>, plots <out>/lr_sweep.png, prints the losses.

    Returns learning rate -> mean loss over the last tenth of the log; infinite where a run diverged.
    """
    if not factors or not all(0 < factor < math.inf for factor in factors):
        raise ValueError("give factors on the learning rate, each above 0: lr_sweep.py 0.5 1 2 --config FILE")
    out, optimizer, losses = run.out or Path("runs/sweep"), run.train.optimizer, {}
    for factor in factors:
        lr = replace(optimizer.lr, initial=factor * optimizer.lr.initial, final=factor * optimizer.lr.final)
        train = replace(run.train, optimizer=replace(optimizer, lr=lr), max_skipped_steps=1)
        folder = out / f"lr-{lr.initial:g}"
        try:
            TRAININGS[kind][1](replace(run, train=train, out=folder))
            losses[lr.initial] = last_loss(folder)
        except FloatingPointError as error:
            print(f"learning rate {lr.initial:g} diverged: {error}")
            losses[lr.initial] = float("inf")
    plot_sweep(out, losses)
    print("learning rate    loss")
    for rate, loss in losses.items():
        print(f"{rate:9.3g}{loss:8.4f}{'  <- lowest' if loss == min(losses.values()) else ''}")
    return losses


def curve(folder: Path) -> list[tuple[float, float]]:
    """(step, loss) of each line that a training logged."""
    from dalle.train.loggers import read_log

    return [(line["step"], line["loss"]) for line in read_log(folder / "log.jsonl") if "loss" in line]


def last_loss(folder: Path) -> float:
    """Mean over the last tenth of a run's lines."""
    points = curve(folder)
    return fmean(loss for _, loss in points[-max(1, len(points) // 10) :])


def plot_sweep(out: Path, losses: dict[float, float]) -> None:
    """<out>/lr_sweep.png: loss curves, and the last loss against the learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    curves, ends = figure.subplots(1, 2)
    for rate in losses:
        if points := curve(out / f"lr-{rate:g}"):
            curves.plot(*zip(*points, strict=True), linewidth=1, label=f"{rate:g}")
    curves.legend(title="learning rate", fontsize=8)
    ends.plot(list(losses), list(losses.values()), marker="o", linewidth=1)
    ends.set_xscale("log")
    for axis, below in ((curves, "step"), (ends, "learning rate")):
        axis.set_xlabel(below)
        axis.set_ylabel("loss")
        axis.grid(alpha=0.3)
    figure.savefig(out / "lr_sweep.png", dpi=110)


def main() -> None:
    """Command line of lr_sweep."""
    with cli_errors(parallel=True):
        overview(sys.argv[1:], __doc__, EACH_KIND)
        factors = list(takewhile(lambda word: word[:1] != "-", sys.argv[1:]))
        try:
            numbers = [float(factor) for factor in factors]
        except ValueError as error:
            raise ValueError(f"factors on the learning rate must be numbers: {error}") from None
        kind, words = take_kind(sys.argv[1 + len(factors) :])
        args = parse(TRAININGS[kind][0], words, description=__doc__)
        sweep(kind, args, numbers)

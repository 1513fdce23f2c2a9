"""Plot the training curves of one or many runs, from their log.jsonl, as one image.

python scripts/plot.py runs/transformer
python scripts/plot.py runs/small runs/small-muon --labels AdamW Muon --smooth 0.9 --log-x --out compared.png
python scripts/plot.py runs/transformer --gradient-scales --out scales.png
python scripts/plot.py runs/transformer --metrics grad_norm lr skipped tokens_per_sec mfu data_time_frac
"""

from pathlib import Path

from tyro.conf import Positional

from dalle.config import cli_errors, configuration, parse


@configuration
class PlotArgs:
    """Plots curves of runs: a panel for each metric, a color for each run."""

    runs: Positional[tuple[Path, ...]] = ()
    """Directories of training runs, or their log.jsonl."""
    metrics: tuple[str, ...] = ()
    """Names in log.jsonl, such as grad_norm lr tokens_per_sec; by default the losses of the runs.
    Validation values of the same name (val/NAME) are dots."""
    labels: tuple[str, ...] = ()
    """Names of the runs; by default those of their directories."""
    smooth: float = 0.0
    """Weight of the previous average in the moving average of training values, in [0, 1); 0 for none."""
    log_x: bool = False
    """Steps on a logarithmic axis."""
    log_y: bool = False
    """Values on a logarithmic axis."""
    chance: bool = True
    """A dotted line at the value of an uninformed model: ln(vocabulary) for nats per token."""
    gradient_scales: bool = False
    """Instead, Figure 12 for one run in fp16: the gradient scale of each residual block."""
    out: Path = Path("curves.png")
    """File of the image."""

    def __post_init__(self):
        if not 0 <= self.smooth < 1:
            raise ValueError(f"smooth must lie in [0, 1), got {self.smooth}")
        if self.labels and len(self.labels) != len(self.runs):
            raise ValueError(f"{len(self.labels)} labels for {len(self.runs)} runs; give one for each")


def main() -> None:
    """Parses the command line and writes the image."""
    with cli_errors():
        plot(parse(PlotArgs, description=__doc__))


def plot(args: PlotArgs) -> None:
    """Reads the runs and writes the image; ValueError for a run without a log, a metric that no run has."""
    from dalle.io.files import prepare_file
    from dalle.viz.curves import plot_curves, plot_gradient_scales

    if not args.runs:
        raise ValueError("no runs to plot; give one or more: python scripts/plot.py runs/transformer")
    if args.gradient_scales and len(args.runs) > 1:
        raise ValueError(f"--gradient-scales plots one run, got {len(args.runs)}")
    prepare_file(args.out)
    if args.gradient_scales:
        image = plot_gradient_scales(args.runs[0])
    else:
        runs = dict(zip(args.labels, args.runs, strict=True)) if args.labels else args.runs
        image = plot_curves(runs, args.metrics, args.smooth, args.log_x, args.log_y, args.chance)
    image.save(args.out)
    print(f"wrote {args.out}")

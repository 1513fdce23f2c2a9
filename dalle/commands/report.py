"""Show any run as one HTML page: curves, images, attention, codebook, masks, evaluations, configuration.

python scripts/report.py runs/quickstart                            writes runs/quickstart/report.html
python scripts/report.py runs/transformer --no-sample               files of the folder only, in a second
python scripts/report.py runs/my-model --prompts "a red cross above a blue circle" --best-of 64
python scripts/report.py evaluation.json                            the numbers of scripts/evaluate.py
"""

from pathlib import Path

from tyro.conf import Positional

from dalle.config import check_positive, cli_errors, configuration, parse
from dalle.sampling import SamplingConfig


@configuration
class ReportArgs:
    """Writes a page about a run folder: a training, the quick start, a model, samples, or an evaluation."""

    run: Positional[Path] = Path("runs/quickstart")
    """The folder, or the JSON of scripts/evaluate.py."""
    out: Path | None = None
    """File of the page; by default report.html in the folder."""
    sample: bool = True
    """Load the model for samples, attention and codebook."""
    prompts: tuple[str, ...] = ()
    """Prompts; by default the first validation captions of the training's dataset."""
    captions: int = 4
    """Number of validation captions."""
    best_of: int = 16
    """Candidates per prompt; 512 in the paper."""
    temperature: float | None = None
    """Sampling temperature; by default that of the folder's own evaluation, else 1 as in the paper."""
    num_codes: int = 256
    """Maximum number of codes shown."""
    seed: int = 0
    """Seed of the samples."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first available."""

    def __post_init__(self):
        check_positive(self, "captions", "best_of", "num_codes")
        SamplingConfig(1.0 if self.temperature is None else self.temperature)


def main() -> None:
    """Parses the command line and writes the page."""
    with cli_errors():
        write_report(parse(ReportArgs, description=__doc__))


def write_report(args: ReportArgs) -> Path:
    """Writes the page and returns its path; ValueError for nothing of this library there.

    The page lists the sections that the folder has nothing for.
    """
    from dalle.io.files import prepare_file, write_text
    from dalle.report.context import ReportContext
    from dalle.report.page import render
    from dalle.report.sections import make_sections

    context = ReportContext(args)
    out = args.out or context.root / "report.html"
    prepare_file(out)
    sections, missing = make_sections(context)
    title = "/".join(args.run.resolve().parts[-2:])
    other = "model" if context.model_directory else "evaluation" if context.evaluations else "samples"
    write_text(out, render(title, ", ".join(context.runs) or other, sections, missing))
    print(f"{out}: {len(sections)} sections, {out.stat().st_size / 1e6:.1f} MB; open it in a browser")
    for line in missing:
        print(f"left out: {line}".replace("\n", "\n    "))
    return out

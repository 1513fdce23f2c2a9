"""Show any run as one page: curves, images, attention, codes, masks, numbers, configuration, hashes.

python scripts/report.py runs/quickstart                            writes runs/quickstart/report.html
python scripts/report.py runs/transformer --no-draw                 what lies in the folder, in a second
python scripts/report.py runs/my-model --prompts "a red cross above a blue circle" --best-of 64
python scripts/report.py evaluation.json                            the numbers of scripts/evaluate.py
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from dalle.config import cli_errors, parse
from dalle.io.files import make_directory, write_text
from dalle.pipelines.config import SamplingConfig
from dalle.report import from_files as report_files
from dalle.report.folder import Folder, examine
from dalle.report.from_model import Bench
from dalle.report.html import Section, escape, page


@dataclass(frozen=True)
class ReportArgs:
    """Writes a page about any run folder: a training, the quick start, a model, samples, or an evaluation's JSON."""

    run: tyro.conf.Positional[Path] = Path("runs/quickstart")
    """The folder, or the JSON that scripts/evaluate.py wrote."""
    out: Path | None = None
    """File of the page; report.html in the folder unless given."""
    draw: bool = True
    """Open the model and draw samples, attention and codes; without it the page shows what lies in the folder."""
    prompts: tuple[str, ...] = ()
    """Captions to draw; the first held-out ones of the training's data unless given."""
    captions: int = 4
    """Held-out captions to draw."""
    best_of: int = 16
    """Candidates of each; the paper draws 512."""
    temperature: float | None = None
    """Of the samples; that of the folder's own evaluation, else 1 as the paper, unless given."""
    codes: int = 256
    """Codes shown, at most."""
    seed: int = 0
    """Of the samples."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first there is."""

    def __post_init__(self):
        for name in ("captions", "best_of", "codes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        SamplingConfig(1.0 if self.temperature is None else self.temperature)


def write_report(run: ReportArgs) -> Path:
    """Writes the page and returns its path. What the folder has no files for is left out, with a line that says so.

    Raises:
        ValueError: nothing of this library at that place, or the page cannot be written there.
    """
    folder = examine(run.run)
    out = run.out or folder.root / "report.html"
    if out.is_dir():
        raise ValueError(f"{out} is a directory; expected the name of a file")
    make_directory(out.parent)
    sections: list[Section] = []
    reasons: dict[str, list[str]] = {}
    for name, title, make in _sections(folder, Bench(folder, run)):
        try:
            sections.append(Section(name, title, make()))
        except ValueError as error:
            reasons.setdefault(str(error), []).append(title)
    missing = [f"{', '.join(titles)}: {reason}" for reason, titles in reasons.items()]
    missing += report_files.kinds_missing(folder)
    kinds = ", ".join(folder.runs) or (
        "model" if folder.model else "evaluation" if folder.evaluations else "samples"
    )
    lead = f'<p class="pale">{escape(kinds)}</p>'
    write_text(out, page(_name(run.run), lead, sections, missing))
    print(f"{out}: {len(sections)} sections, {out.stat().st_size / 1e6:.1f} MB; open it in a browser")
    for line in missing:
        print(f"left out: {line}".replace("\n", "\n    "))
    return out


def _name(path: Path) -> str:
    """The last two names of the folder: "runs/quickstart"."""
    return "/".join(path.resolve().parts[-2:])


def _sections(folder: Folder, bench: Bench) -> list[tuple[str, str, Callable[[], str]]]:
    """In the order of the page: anchor, heading, what makes it."""
    return [
        ("overview", "Overview", lambda: report_files.overview(folder)),
        ("samples", "Samples", bench.samples),
        ("rerank", "Reranking", bench.rerank),
        ("attention", "Attention", bench.attention),
        ("curves", "Curves", lambda: report_files.curves(folder)),
        ("time", "Images over time", lambda: report_files.sheets(folder)),
        ("codebook", "Codebook", bench.codebook),
        ("masks", "Masks", bench.masks),
        ("evaluation", "Evaluation", lambda: report_files.evaluation(folder)),
        ("configuration", "Configuration", lambda: report_files.configuration(folder)),
        ("checkpoints", "Checkpoints", lambda: report_files.checkpoints(folder)),
        ("versions", "Versions and hardware", lambda: report_files.versions(folder)),
    ]


def main() -> None:
    """Command line of report."""
    with cli_errors():
        write_report(parse(ReportArgs, description=__doc__))

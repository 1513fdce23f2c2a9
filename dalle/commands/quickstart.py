"""Train all of DALL-E small on shapes and generate images of captions it never saw.

python scripts/quickstart.py                                        about twenty minutes on two cores
"""

from pathlib import Path

from dalle.config import CONFIGS, check_positive, cli_errors, configuration, parse
from dalle.runs import ROOT
from dalle.sampling import SamplingConfig


@configuration
class QuickstartArgs:
    """Train tokenizer, dVAE, transformer and CLIP on shapes, then sample images of held-out captions."""

    out: Path = ROOT / "quickstart"
    """Output directory; a finished quick start in it is moved aside, an interrupted one resumes."""
    seed: int = 0
    """Seed of every stage."""
    captions: int = 200
    """Held-out captions to sample, of each kind."""
    best_of: int = 16
    """Candidates of each caption, ranked by the CLIP trained here."""
    temperature: float = 0.4
    """Sampling temperature (paper: 1); so short a training leaves noise in the tails of the distribution."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first that is available."""
    configs: Path = CONFIGS
    """Directory with <family>/shapes.yaml of each family."""

    def __post_init__(self):
        check_positive(self, "captions", "best_of")
        SamplingConfig(self.temperature)


def main() -> None:
    """Command line of quickstart."""
    with cli_errors():
        run = parse(QuickstartArgs, description=__doc__)
        from dalle.runs.quickstart import quickstart

        quickstart(run)

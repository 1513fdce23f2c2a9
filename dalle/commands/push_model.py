"""Upload a model to the Hugging Face Hub; look first with --dry-run, which uploads nothing.

python scripts/push_model.py runs/quickstart/model --dry-run
python scripts/push_model.py runs/quickstart/model --to owner/name --report runs/quickstart/report.json --license mit
python scripts/push_model.py runs/quickstart/dvae --to owner/name-dvae        the part that a run trained, alone
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tyro.conf import Positional

from dalle.config import cli_errors, parse
from dalle.hub.hub import check_login, list_hub_files, push_to_hub
from dalle.hub.model_card import CARD, addressed, read_card
from dalle.hub.registry import LoadedModel


@dataclass(frozen=True)
class PushModelArgs:
    """Uploads a model directory, or the part that a run trained."""

    path: Positional[Path | None] = None
    """Model directory (its README.md goes as it lies), or the run of a dVAE, a transformer or a CLIP."""
    to: str = ""
    """Repository, owner/name; made if there is none."""
    report: Path | None = None
    """report.json of the run: its figures go into a card written anew."""
    license: str | None = None
    """Licence you give the model, as the Hub calls it (mit, cc-by-4.0, ...): for a card written anew. Never guessed."""
    private: bool = False
    """Make a new repository private."""
    revision: str | None = None
    """Branch; main unless given."""
    message: str | None = None
    """Of the commit."""
    dry_run: bool = False
    """List the files with their sizes and print the card; nothing is uploaded, no login is needed."""


def push_model(run: PushModelArgs) -> str | None:
    """Uploads, or with dry_run tells what would be; the address of the commit.

    Raises:
        ValueError: no model there, a report of another model, no login, or the Hub refuses.
    """
    if run.path is None:
        raise ValueError("say which: python scripts/push_model.py DIRECTORY --to owner/name")
    if not run.path.is_dir():
        raise ValueError(f"no directory {run.path}; give a model directory or a run")
    if not run.dry_run:
        check_login(run.to)
    with TemporaryDirectory() as folder:
        directory = _model_directory(run.path, Path(folder) / "model")
        card = read_card(directory, run.report, run.license)
        if run.dry_run:
            return _tell(directory, card, run.to)
        address = push_to_hub(directory, run.to, card, run.private or None, run.revision, message=run.message)
    print(f"{run.path} is at {address}")
    return address


def _model_directory(path: Path, room: Path) -> Path:
    """The path, or of a run its part as a model directory in `room`."""
    if (path / "config.json").is_file():
        return path
    LoadedModel.from_pretrained(path).save_pretrained(room)
    return room


def _tell(directory: Path, card: str, to: str) -> None:
    card = addressed(card, to) if to else card
    print(f"would go to {to or 'the repository that --to names'}:")
    sizes = {CARD: len(card.encode())} | {
        name: path.stat().st_size for name, path in list_hub_files(directory).items()
    }
    for name, size in sizes.items():
        print(f"  {size:>14,} bytes  {name}")
    print(f"\n{CARD}:\n\n{card}\nNothing was uploaded.")


def main() -> None:
    """Command line of push_model."""
    with cli_errors():
        push_model(parse(PushModelArgs, description=__doc__))

"""A model to the Hugging Face Hub, or first only what would go there."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tyro.conf import Positional

from dalle.card import CARD, addressed, write_card
from dalle.hub import check_login, list_files, push
from dalle.models import Part


@dataclass(frozen=True)
class PushRun:
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


def push_model(run: PushRun) -> str | None:
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
        directory = _prepare(run, Path(folder) / "model")
        if run.dry_run:
            return _tell(directory, run.to)
        address = push(directory, run.to, run.private or None, run.revision, message=run.message)
    print(f"{run.path} is at {address}")
    return address


def _prepare(run: PushRun, room: Path) -> Path:
    """The model directory with the card that shall go; the user's own files stay as they are."""
    if not (run.path / "config.json").is_file():
        Part.from_pretrained(run.path).save_pretrained(room, run.report, run.license)
        return room
    if run.report is None and run.license is None and (run.path / CARD).is_file():
        return run.path
    room.mkdir()
    for path in run.path.iterdir():
        if path.is_file() and path.name != CARD:
            (room / path.name).symlink_to(path.resolve())
    write_card(room, run.report, run.license)
    return room


def _tell(directory: Path, to: str) -> None:
    print(f"would go to {to or 'the repository that --to names'}:")
    for name, path in list_files(directory).items():
        print(f"  {path.stat().st_size:>14,} bytes  {name}")
    card = (directory / CARD).read_text(encoding="utf-8")
    print(f"\n{CARD}:\n\n{addressed(card, to) if to else card}")
    print("Nothing was uploaded.")

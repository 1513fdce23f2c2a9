"""Upload a model to the Hugging Face Hub; --dry-run lists the files and prints the card instead.

python scripts/push_model.py runs/quickstart/model --dry-run
python scripts/push_model.py runs/quickstart/model --to owner/name --report runs/quickstart/report.json
python scripts/push_model.py runs/quickstart/dvae --to owner/name-dvae       only the model of this run
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from tyro.conf import Positional

from dalle.config import cli_errors, configuration, parse


@configuration
class PushModelArgs:
    """Uploads a model directory, or the model of a run."""

    path: Positional[Path | None] = None
    """Model directory (its README.md is kept), or the run of a dVAE, a transformer or a CLIP."""
    to: str = ""
    """Repository, owner/name; created if there is none."""
    report: Path | None = None
    """report.json of the run; a new card with its figures is written."""
    license: str | None = None
    """License of the model, as the Hub names it (mit, cc-by-4.0, ...); a new card with it is written."""
    private: bool = False
    """Make a new repository private."""
    revision: str | None = None
    """Branch; main unless given."""
    message: str = "Upload of a model directory"
    """Of the commit."""
    dry_run: bool = False
    """List the files with their sizes and print the card; nothing is uploaded, no login is needed."""


def push_model(args: PushModelArgs) -> str | None:
    """Uploads and returns the address of the commit; with dry_run prints what would be uploaded.

    Raises:
        ValueError: no model there, a report of another model, no login, or the Hub refuses.
    """
    from dalle.hub.hub import check_login, list_hub_files, push_to_hub
    from dalle.hub.model_card import CARD, PLACEHOLDER, read_card
    from dalle.hub.registry import LoadedModel

    if args.path is None or not args.path.is_dir():
        usage = "python scripts/push_model.py DIRECTORY --to owner/name"
        raise ValueError(f"expected a model directory or a run, got {args.path}: {usage}")
    if not args.dry_run:
        check_login(args.to)
    with TemporaryDirectory() as folder:
        directory = args.path
        if not (directory / "config.json").is_file():
            directory = Path(folder)
            LoadedModel.from_pretrained(args.path).save_pretrained(directory)
        if not args.dry_run:
            about = {"private": args.private or None, "revision": args.revision, "message": args.message}
            url = push_to_hub(directory, args.to, args.report, args.license, **about)
            print(f"{args.path} is at {url}")
            return url
        card = read_card(directory, args.report, args.license).replace(PLACEHOLDER, args.to or PLACEHOLDER)
        sizes = {CARD: len(card.encode())}
        sizes |= {name: path.stat().st_size for name, path in list_hub_files(directory).items()}
    print(f"would go to {args.to or 'the repository that --to names'}:")
    for name, size in sizes.items():
        print(f"  {size:>14,} bytes  {name}")
    print(f"\n{CARD}:\n\n{card}\nNothing was uploaded.")
    return None


def main() -> None:
    """Command line of push_model."""
    with cli_errors():
        push_model(parse(PushModelArgs, description=__doc__))

"""Inspect a checkpoint of this library or another without running code in it.

python scripts/inspect_checkpoint.py dalle.pt                       format, sizes, license, faults, SHA-256
python scripts/inspect_checkpoint.py runs/dvae --json report.json   also a run, checkpoint or model directory
"""

from pathlib import Path
from typing import Any

from tyro.conf import Positional

from dalle.config import cli_errors, configuration, parse

SHOWN = 5  # names of a list that are printed; the JSON has them all


@configuration
class InspectCheckpointArgs:
    """Says what a checkpoint file, run or model directory holds."""

    path: Positional[Path | None] = None
    """The file, or the directory."""
    json: Path | None = None
    """File for the report; printed too."""


def main() -> None:
    """Parses the command line and prints the report."""
    with cli_errors():
        inspect_checkpoint(parse(InspectCheckpointArgs, description=__doc__))


def inspect_checkpoint(args: InspectCheckpointArgs) -> dict[str, Any]:
    """The report, printed and written.

    Raises:
        ValueError: nothing there, a file that is broken or would run code, an unsupported checkpoint.
    """
    from dalle.io.files import prepare_file, write_json
    from dalle.pretrained.inspect import describe_checkpoint

    if args.path is None:
        raise ValueError("give a path: python scripts/inspect_checkpoint.py FILE or DIRECTORY")
    if not args.path.exists():
        raise ValueError(f"nothing at {args.path}; give a checkpoint's file, or the folder of a run or model")
    if args.json:
        prepare_file(args.json)
    report = {"path": str(args.path), **describe_checkpoint(args.path)}
    if args.json:
        write_json(args.json, report)
    for name, value in report.items():
        print(f"{name:<12} {_one_line(value)}")
    return report


def _one_line(value: Any) -> str:
    """A value of the report, lists cut, names without control characters."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_one_line(inner)}" for name, inner in value.items())
    if isinstance(value, list) and len(value) > SHOWN and all(isinstance(inner, str) for inner in value):
        return f"{len(value)}: {_one_line(value[:SHOWN])}, ..."
    if isinstance(value, list):
        return ", ".join(map(_one_line, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else ascii(str(value))[1:-1]

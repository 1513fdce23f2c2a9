"""Runs the notebooks and keeps what they showed, so that they can be read where nothing runs.

What is kept is the same on every machine but for the numbers themselves: no times, no names of machines.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tyro.conf import Positional

from dalle.io.files import write_text
from dalle.runs.args import ROOT

FOLDER = Path("notebooks")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


@dataclass(frozen=True)
class NotebooksRun:
    """Executes notebooks in place, their outputs among them."""

    paths: Positional[tuple[Path, ...]] = ()
    """The notebooks; all of notebooks/ unless given."""
    quickstart: Path = ROOT / "quickstart"
    """What the quick start made: its model is looked at."""
    small: bool = False
    """At the size of a test: seconds, and images of nothing."""
    minutes: float = 30.0
    """A cell may take so long."""

    def __post_init__(self):
        if not self.minutes > 0:
            raise ValueError(f"minutes must be positive, got {self.minutes}")


def run_notebooks(run: NotebooksRun) -> None:
    """Executes each notebook in its own folder and writes it back.

    Raises:
        ValueError: no notebook, no model of the quick start, a missing package, or a cell that failed; that notebook
            stays as it was.
    """
    if not (run.quickstart / "model" / "config.json").is_file():
        raise ValueError(
            f"no model at {run.quickstart / 'model'}; the notebooks look into it: make quickstart"
        )
    paths = run.paths or tuple(sorted(FOLDER.glob("*.ipynb")))
    if not paths:
        raise ValueError(f"no notebooks in {FOLDER}/; start this in the project's folder, or name them")
    for path in tqdm(paths, desc="notebooks", disable=None):
        run_notebook(path, run.quickstart, run.small, run.minutes)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def run_notebook(path: Path, quickstart: Path, small: bool = False, minutes: float = 30.0) -> None:
    """Executes one notebook in a fresh kernel that starts in its folder, and writes it back, tidied.

    Raises:
        ValueError: no such file, a missing package, or a cell that failed: which, and what it said.
    """
    if not path.is_file():
        raise ValueError(f"no notebook at {path}")
    nbformat, nbclient = _packages()
    book = nbformat.read(path, as_version=4)
    told = {
        "NOTEBOOK_QUICKSTART": os.path.relpath(quickstart, path.parent),
        "NOTEBOOK_SMALL": str(int(small)),
    }
    client = nbclient.NotebookClient(
        book,
        kernel_name="python3",
        timeout=round(60 * minutes),
        startup_timeout=300,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(path.parent)}},
    )
    try:
        client.execute(env=os.environ | told)
    except nbclient.exceptions.CellExecutionError as error:
        raise ValueError(f"{path}: a cell failed: {error.ename}: {error.evalue}\n{_failed(book)}") from None
    except (RuntimeError, TimeoutError) as error:
        raise ValueError(f"{path}: the kernel did not start, died, or took too long: {error}") from None
    tidy(book)
    write_text(path, nbformat.writes(book) + "\n")


def _failed(book: Any) -> str:
    """The source of the cell that failed."""
    for cell in book.cells:
        if any(output.output_type == "error" for output in cell.get("outputs", ())):
            return cell.source
    return ""


def tidy(book: Any) -> None:
    """Takes out what differs from machine to machine, and what is there twice."""
    book.metadata = METADATA
    for cell in book.cells:
        cell.metadata = {}
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                data.pop("image/jpeg", None)  # an image offers itself in both
                data["text/plain"] = "an image"  # else its address in memory
            output.pop("metadata", None) if output.output_type == "stream" else output.update(metadata={})


def _packages() -> tuple[Any, Any]:
    try:
        import ipykernel  # noqa: F401  the kernel that nbclient starts
        import nbclient
        import nbformat
    except ImportError as error:
        raise ValueError(f"running notebooks needs {error.name}: pip install -e '.[notebooks]'") from None
    return nbformat, nbclient

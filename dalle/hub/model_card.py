"""README.md of a model directory: the model card of the Hugging Face Hub, from what the directory itself
says.

What is not known is not told: no licence is guessed, no figure made up.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
from safetensors import SafetensorError, safe_open

from dalle.io.files import read_json, write_text
from dalle.io.format import read_config

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.jinja")
LIBRARY = "zeroshot-text2image"
Report = dict[str, Any] | Path | str
"""Figures of a run, or the file of its report.json."""
PLACEHOLDER = "path/of/this/folder"
"""In the card's example until the model has an id."""
LISTED = 8
"""Values of a list that a figure shows."""

ABOUT = {
    "dalle": ("DALL-E", "Draws images for captions."),
    "dvae": ("The dVAE of a DALL-E", "Turns images into tokens, and tokens into images."),
    "transformer": ("The transformer of a DALL-E", "Draws the image tokens of an image for a caption."),
    "clip": ("The CLIP of a DALL-E", "Says how well an image fits a caption."),
}
DRAWING = """\
from dalle import DALLE

model = DALLE.from_pretrained("{place}")
# a caption such as those it was trained on: 16 candidates, of which CLIP picks four
model.generate("a red circle", n=4, best_of=16).grid()"""
UNRANKED = """\
from dalle import DALLE

model = DALLE.from_pretrained("{place}")
# a caption such as those it was trained on
model.generate("a red circle", n=4, best_of=4).grid()"""
OPENING = """\
from dalle import LoadedModel

model = LoadedModel.from_pretrained("{place}", "{kind}").model"""


def write_card(directory: Path, report: Report | None = None, license: str | None = None) -> None:
    """Writes README.md into a model directory, over what was there.

    Args:
        directory: what `save_pretrained` wrote.
        report: figures of the run as a dict, or the file of its report.json.
        license: as the Hub calls it, "mit" or "cc-by-4.0" say; without one the card says that none is given.

    Raises:
        ValueError: no model directory, a report that cannot be read, or one of another model.
    """
    write_text(directory / CARD, model_card(directory, report, license))


def model_card(directory: Path, report: Report | None = None, license: str | None = None) -> str:
    """The text that `write_card` writes."""
    config = read_config(directory)
    parts, links, license = config["parts"], config["links"], license or None
    figures = read_report(report, parts)
    kind = "dalle" if {"dvae", "transformer"} <= parts.keys() else next(iter(parts))
    title, about = ABOUT[kind]
    example = (DRAWING if "clip" in parts else UNRANKED) if kind == "dalle" else OPENING
    tags = ["dalle", "text-to-image"] if kind == "dalle" else ["dalle", kind]
    task = "text-to-image" if kind == "dalle" else None
    data = huggingface_hub.ModelCardData(license=license, library_name=LIBRARY, pipeline_tag=task, tags=tags)
    card = huggingface_hub.ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=title,
        about=about,
        usage=example.format(place=PLACEHOLDER, kind=kind),
        parts=[_part(directory, name, part) for name, part in parts.items()],
        text_hash=links.get("text"),
        dvae_hash=None if "dvae" in parts else links.get("dvae"),
        figures=list(flatten(figures)),
        license=license,
    )
    return str(card)


def read_report(report: Report | None, parts: dict[str, Any]) -> dict[str, Any]:
    """The figures, none without a report.

    Args:
        report: see `Report`; its "model", if there, names the weights it is of.
        parts: as in config.json, with their hashes.

    Raises:
        ValueError: a file that cannot be read, or figures of other weights.
    """
    if report is not None and not isinstance(report, dict):
        if not Path(report).is_file():
            raise ValueError(f"no report {report}; give the report.json of a run")
        source, report = report, read_json(Path(report))
        if not isinstance(report, dict):
            raise ValueError(f"{source} is no report: expected names and values")
    report = report or {}
    named, own = report.get("model"), [part["hash"] for part in parts.values()]
    if isinstance(named, str) and not set(own) <= set(named.split("-")):
        raise ValueError(
            f"the report is of the model {named}, the weights here are {'-'.join(own)}; give its own"
        )
    return report


def read_card(directory: Path, report: Report | None = None, license: str | None = None) -> str:
    """The README.md that lies in a model directory; made anew if there is none, or a report or a licence is
    given."""
    if report is None and license is None and (directory / CARD).is_file():
        return (directory / CARD).read_text(encoding="utf-8")
    return model_card(directory, report, license)


def addressed(card: str, repo_id: str) -> str:
    """The text of a card whose example opens a repository instead of a folder."""
    return card.replace(PLACEHOLDER, repo_id)


def flatten(report: dict[str, Any], place: str = "") -> Iterator[tuple[str, str]]:
    """A report as rows of a table, (dotted name, value); hashes of the model, told elsewhere, left out."""
    for name, value in report.items():
        where = f"{place}.{name}" if place else str(name)
        if isinstance(value, dict):
            yield from flatten(value, where)
        elif value is not None and where != "model":
            yield _cell(where), _cell(_shown(value))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_shown, value[:LISTED]))}{', ...' * (len(value) > LISTED)})"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _cell(text: str) -> str:
    """Text that stays in its cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _part(directory: Path, kind: str, part: dict[str, Any]) -> dict[str, str]:
    settings = ", ".join(
        f"{name} {_shown(value)}" for name, value in part["config"].items() if value is not None
    )
    parameters = f"{_count(directory / f'{kind}.safetensors'):,}"
    return {"kind": kind, "hash": part["hash"], "parameters": parameters, "settings": settings}


def _count(path: Path) -> int:
    """Numbers in a file of weights, by its header alone."""
    try:
        with safe_open(path, "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return sum(map(math.prod, shapes))

"""Model cards of the Hugging Face Hub: README.md of a model directory, from the directory's own contents."""

import math
from pathlib import Path
from typing import Any

import jinja2
from safetensors import SafetensorError, safe_open

from dalle.io.files import read_config, read_json, write_text
from dalle.io.text import flatten

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.jinja")
PLACEHOLDER = "path/of/this/folder"  # source in the card's example until the model has an id
LISTED = 8
"""Values of a list that a card shows."""
Report = dict[str, Any] | Path | str  # metrics of a run, or the file of its report.json


def write_card(directory: Path, report: Report | None = None, license: str | None = None) -> None:
    """Writes README.md into a model directory; arguments as `model_card`."""
    write_text(directory / CARD, model_card(directory, report, license))


def model_card(directory: Path, report: Report | None = None, license: str | None = None) -> str:
    """The model card of a directory that `save_pretrained` wrote.

    Args:
        report: metrics of the run.
        license: as the Hub names it, for example "mit" or "cc-by-4.0".
    """
    config = read_config(directory)
    parts, inputs = config["parts"], config["inputs"]
    parameters = {}
    for kind in parts:
        path = directory / f"{kind}.safetensors"
        try:
            path.open("rb").close()  # says what is wrong, as safetensors does not
            with safe_open(path, "pt") as file:
                shapes = [file.get_slice(name).get_shape() for name in list(file.keys())]
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        parameters[kind] = sum(map(math.prod, shapes))
    kind = "dalle" if {"dvae", "transformer"} <= parts.keys() else next(iter(parts))
    kind = "glide" if kind == "base" and "text" in inputs else kind
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {"value": format_value, "flatten": flatten}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        kind=kind,
        source=PLACEHOLDER,
        parts=parts,
        parameters=parameters,
        text_hash=inputs.get("text"),
        dvae_hash=None if "dvae" in parts else inputs.get("dvae"),
        metrics=metric_rows(read_report(report, parts)),
        license=license or None,
    )


def read_report(report: Report | None, parts: dict[str, Any]) -> dict[str, Any]:
    """The metrics, empty without a report; ValueError for metrics of other weights than those of `parts`."""
    if report is not None and not isinstance(report, dict):
        if not Path(report).is_file():
            raise ValueError(f"no report {report}; give the report.json of a run")
        report = read_json(Path(report))
    report = report or {}
    named, hashes = report.get("model"), [part["hash"] for part in parts.values()]
    if isinstance(named, str) and not set(hashes) <= set(named.split("-")):
        raise ValueError(f"the report is of the model {named}, the weights here are {'-'.join(hashes)}")
    return report


def read_card(directory: Path, report: Report | None = None, license: str | None = None) -> str:
    """README.md of a model directory; a new one if there is none, or with a report or a license."""
    if report is None and license is None and (directory / CARD).is_file():
        return (directory / CARD).read_text(encoding="utf-8")
    return model_card(directory, report, license)


def metric_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows (dotted name, value) of a Markdown table, without the hash of the model."""
    values = {name: value for name, value in flatten(report).items() if value is not None and name != "model"}
    rows = [(name, format_value(value)) for name, value in values.items()]
    return [tuple(" ".join(cell.split()).replace("|", "\\|") for cell in row) for row in rows]


def format_value(value: Any) -> str:
    """A number with four digits or thousands separators, yes or no, the start of a list, or text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, list | tuple):
        shown = [format_value(item) for item in value[:LISTED]]
        if len(value) > LISTED:
            shown.append("...")
        return f"({', '.join(shown)})"
    return f"{value:,}" if isinstance(value, int) else str(value)

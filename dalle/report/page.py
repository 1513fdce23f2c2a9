"""Items of a report (text, tables, figures) and the self-contained HTML page of them.

The page makes no requests, and its content security policy forbids scripts and requests.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from dalle.hub.model_card import format_value
from dalle.viz.curves import Lines, metric_points, metrics_figure

LOSSLESS = 600
SVG_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "report", "path.simplify_threshold": 1.0}


@dataclass(frozen=True)
class Text:
    """A paragraph or a heading."""

    text: str
    heading: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of values; `marked` rows are highlighted; a `summary` folds it."""

    rows: Sequence[Sequence[Any]]
    head: Sequence[str] = ()
    marked: Sequence[int] = ()
    summary: str = ""


@dataclass(frozen=True)
class Figure:
    """An image as a data URL, its alternative text and its caption."""

    source: str
    alt: str
    caption: str = ""
    css: str = ""


Item = Figure | Table | Text


def image_figure(image: Image.Image, alt: str, caption: str = "", css: str = "") -> Figure:
    """A WebP, lossless up to `LOSSLESS` pixels on a side."""
    buffer = BytesIO()
    image.convert("RGB").save(buffer, format="WEBP", lossless=max(image.size) <= LOSSLESS, quality=90)
    return Figure(_data_url("webp", buffer), alt, caption, css)


def curve_figure(
    title: str, metric: str, lines: Lines, x_label: str = "step", log2: bool = False
) -> Figure | None:
    """A chart of a metric in log lines as SVG; None without a finite point of training or validation."""
    if not (metric_points(lines, metric) or metric_points(lines, f"val/{metric}")):
        return None
    plot = metrics_figure([(title, metric, {metric: lines})])
    plot.axes[0].set_xlabel(x_label)
    if log2:
        plot.axes[0].set_xscale("log", base=2)
    buffer = BytesIO()
    with matplotlib.rc_context(SVG_STYLE):
        plot.savefig(buffer, format="svg", metadata={"Date": None})
    return Figure(_data_url("svg+xml", buffer), title, css="chart")


def _data_url(media: str, buffer: BytesIO) -> str:
    return f"data:image/{media};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def render(title: str, lead: str, sections: dict[str, list[Item]], missing: Sequence[str]) -> str:
    """The page as HTML.

    The anchor of a section is the first word of its title. `missing` has a reason for each section left out,
    with commands on further lines.
    """
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["format_value"] = format_value
    reasons = [reason.partition("\n")[::2] for reason in missing]
    template = environment.get_template("page.html.jinja")
    page = template.render(title=title, lead=lead, sections=sections, missing=reasons)
    return page.encode("utf-8", "backslashreplace").decode()  # lone surrogates

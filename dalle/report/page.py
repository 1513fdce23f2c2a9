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
from matplotlib import figure
from PIL import Image

from dalle.hub.model_card import format_value
from dalle.viz.curves import label_axis

LOSSLESS = 600
MAX_VALUE = 1e100  # of a plotted value; JSON may hold integers beyond any float
SVG_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "report", "path.simplify_threshold": 1.0}
Points = Sequence[tuple[float, float]]


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
    title: str, curves: dict[str, tuple[Points, str]], x_label: str = "step", log2: bool = False
) -> Figure | None:
    """A chart of {name: (points, style)} as SVG; None without a finite point.

    The style is matplotlib's, such as "-" or "o-"; "level" is a dotted line at the first y.
    """
    plot = figure.Figure(figsize=(4.2, 2.6), layout="constrained")
    axis, plotted = plot.subplots(), 0
    for name, (points, style) in curves.items():
        finite = [(x, y) for x, y in points if abs(x) < MAX_VALUE and abs(y) < MAX_VALUE]  # false for NaN
        if finite and style == "level":
            axis.axhline(finite[0][1], linestyle=":", color="grey", label=name)
        elif finite:
            plotted += 1
            style = "o-" if len(finite) == 1 else style
            axis.plot(*zip(*finite, strict=True), style, markersize=3, linewidth=1.2, label=name)
    if not plotted:
        return None
    if log2:
        axis.set_xscale("log", base=2)
    if len(curves) > 1:
        axis.legend(fontsize=7)
    label_axis(axis, title, x_label)
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

"""Items of a report (figures, tables, text) and the self-contained HTML page around them.

The page makes no requests, and its content security policy forbids scripts and requests.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import matplotlib
from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure as Plot
from PIL import Image

from dalle.viz.curves import label_axis

MAX_BYTES = 300_000
"""Of one image; a larger one is compressed with loss."""
MAX_SIDE = 1600
"""Pixels on a side of an image that is compressed with loss."""
MAX_POINTS = 400
"""Of one curve."""
MAX_VALUE = 1e100
"""JSON may hold integers beyond any float; larger values are not plotted."""
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Text:
    """A paragraph or a heading of plain text."""

    text: str
    heading: bool = False
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Table:
    """Rows of plain values; `marked` rows are highlighted; with a `summary` it is folded."""

    rows: Sequence[Sequence[Any]]
    head: Sequence[str] = ()
    marked: Sequence[int] = ()
    summary: str = ""
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Figure:
    """An image as a data URL, its alternative text and its caption."""

    source: str
    alt: str
    caption: str = ""
    css: str = ""
    kind: ClassVar[str] = "figure"


Item = Figure | Table | Text


def image_figure(image: Image.Image, alt: str, caption: str = "", small: bool = False) -> Figure:
    """A PNG, or a smaller WebP where the PNG exceeds `MAX_BYTES`; `small` ones are 7 rem wide."""
    image, side, media = image.convert("RGB"), MAX_SIDE, "png"
    data = _encode(image, "PNG")
    while len(data) > MAX_BYTES:
        image.thumbnail((side, side))
        data, media, side = _encode(image, "WEBP", quality=85), "webp", side * 3 // 4
    css = "" if not small else "small pixelated" if image.width < 128 else "small"
    return Figure(_data_url(media, data), alt, caption, css)


def curve_figure(
    title: str, curves: dict[str, tuple[Points, str]], x_label: str = "step", log2: bool = False
) -> Figure | None:
    """A chart of {name: (points, style)} as SVG; None without a finite point.

    The style is matplotlib's, such as "-" or "o-"; "level" is a dotted line at the first y.
    """
    finite = {name: (_finite(points), style) for name, (points, style) in curves.items()}
    finite = {name: (points, style) for name, (points, style) in finite.items() if points}
    if all(style == "level" for _, style in finite.values()):
        return None
    plot = Plot(figsize=(4.2, 2.6), layout="constrained")
    axis = plot.subplots()
    for number, (name, (points, style)) in enumerate(finite.items()):
        color = f"C{number}"
        if style == "level":
            axis.axhline(points[0][1], linestyle=":", color=color, label=name)
        else:
            style = "o-" if len(points) == 1 else style
            axis.plot(*zip(*thin(points), strict=True), style, color=color, ms=3, lw=1.2, label=name)
    if log2:
        axis.set_xscale("log", base=2)
    if len(finite) > 1:
        axis.legend(fontsize=7)
    label_axis(axis, title, x_label)
    buffer = BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        plot.savefig(buffer, format="svg", metadata={"Date": None})
    return Figure(_data_url("svg+xml", buffer.getvalue()), title, css="chart")


def thin(points: Points, limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= limit:
        return list(points)
    result: list[tuple[float, float]] = []
    for i in range(limit // 2):
        stretch = points[i * len(points) // (limit // 2) : (i + 1) * len(points) // (limit // 2)]
        result += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return result


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if abs(x) < MAX_VALUE and abs(y) < MAX_VALUE]  # false for NaN


def _encode(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def _data_url(media: str, data: bytes) -> str:
    return f"data:image/{media};base64,{base64.b64encode(data).decode()}"


def format_value(value: Any) -> str:
    """A JSON value: integers and large numbers with separators, other floats with four digits."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) or (isinstance(value, float) and 1e4 <= abs(value) < 1e15):
        return f"{value:,.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def render(title: str, lead: str, sections: Sequence[tuple[str, list[Item]]], missing: Sequence[str]) -> str:
    """The page as HTML.

    Args:
        title, lead: plain text of the heading and the line below it.
        sections: (title, items) in order; the anchor is the first word of the title.
        missing: a reason for each section left out, with commands that make it on further lines.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["format_value"] = format_value
    named = [{"anchor": name.split()[0].lower(), "title": name, "content": items} for name, items in sections]
    reasons = [reason.partition("\n")[::2] for reason in missing]
    template = environment.get_template("page.html.jinja")
    page = template.render(title=title, lead=lead, sections=named, missing=reasons)
    return page.encode("utf-8", "backslashreplace").decode()  # lone surrogates

"""What a report is made of: escaped text, images as data, tables, and the page around them.

The page is one file. It asks for nothing from outside, and its policy forbids the browser to: no scripts, no requests.
"""

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image

from dalle.data.histograms import plain

MOST_BYTES = 300_000
"""Of one image; a larger one is made smaller, then coded with loss."""
MOST_SIDE = 1600
"""Pixels on a side of an image that is made smaller."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --page: #fbfbfd; --ink: #1c1e21; --pale: #676d76; --line: #dcdfe4; --card: #ffffff;
  --c0: #2d6cb5; --c1: #d0642b; --c2: #3b8f4e; --mark: #fff4d6; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --ink: #e6e8eb; --pale: #9aa1ab; --line: #33373d;
  --card: #1d2024; --c0: #7db3f2; --c1: #f2a36b; --c2: #7fd08f; --mark: #3d3420; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main, header { max-width: 70rem; margin: 0 auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 1.5rem 0 0.25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.5rem; border-bottom: 1px solid var(--line); padding-bottom: 0.25rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 0.5rem; overflow-wrap: anywhere; }
p { margin: 0.4rem 0; max-width: 48rem; overflow-wrap: anywhere; }
.pale { color: var(--pale); }
nav { display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; margin: 0.75rem 0; }
a { color: var(--c0); }
code { font: 0.88em ui-monospace, monospace; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.rows { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 31rem), 1fr)); gap: 0 1.5rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 0.5rem; }
.card svg { display: block; width: 100%; height: auto; }
.images { display: flex; flex-wrap: wrap; gap: 0.75rem; align-items: flex-end; }
figure { margin: 0; max-width: 100%; }
figcaption { font-size: 0.85rem; color: var(--pale); overflow-wrap: anywhere; }
img { display: block; max-width: 100%; height: auto; border-radius: 3px; background: #fff; }
img.small { width: 7rem; }
img.sharp { image-rendering: pixelated; }
.wide { overflow-x: auto; margin: 0.5rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { text-align: left; padding: 0.2rem 0.8rem 0.2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
pre { overflow-x: auto; font-size: 0.88em; margin: 0.2rem 0 1rem; }
tr.differs td { background: var(--mark); }
details { margin: 0.5rem 0; }
footer { margin: 3rem 0 2rem; font-size: 0.85rem; color: var(--pale); }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    name: str
    """Its anchor."""
    title: str
    """Its heading, plain text."""
    body: str
    """HTML."""


def escape(value: Any) -> str:
    """Text for HTML, inside elements and attributes; what UTF-8 cannot hold is spelt out."""
    return html.escape(plain(str(value)), quote=True)


def image_tag(image: Image.Image, alt: str, caption: str = "", small: bool = False) -> str:
    """A figure with the image inside.

    Args:
        alt: what it shows, for who cannot see it.
        caption: stands below it; none unless given.
        small: seven letters wide; enlarged without smoothing.
    """
    kind, data = _coded(image)
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    size = f'width="{image.width}" height="{image.height}"'
    if small:
        size = f'class="small{" sharp" * (image.width < 128)}"'
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img {size} src="{source}" alt="{escape(alt)}">{below}</figure>'


def _coded(image: Image.Image) -> tuple[str, bytes]:
    """Without loss where that is small enough."""
    image = image.convert("RGB")
    if len(data := _bytes(image, "PNG")) <= MOST_BYTES:
        return "png", data
    side = MOST_SIDE
    while len(data) > MOST_BYTES:
        image.thumbnail((side, side))
        data = _bytes(image, "WEBP", quality=85)
        side = side * 3 // 4
    return "webp", data


def _bytes(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def images(figures: Iterable[str]) -> str:
    """Figures side by side."""
    return f'<div class="images">{"".join(figures)}</div>'


def table(rows: Sequence[Sequence[Any]], head: Sequence[str] = (), marked: Sequence[int] = ()) -> str:
    """A table of plain values; `marked` rows have a ground of their own."""
    top = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>" if head else ""
    lines = [
        f"<tr{' class=differs' if i in marked else ''}>{''.join(map(_cell, row))}</tr>"
        for i, row in enumerate(rows)
    ]
    return f'<div class="wide"><table>{top}{"".join(lines)}</table></div>'


def _cell(value: Any) -> str:
    return f"<td>{escape(said(value))}</td>"


def said(value: Any) -> str:
    """A value of JSON in words: whole and large numbers whole, others with four digits, the rest as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) or (isinstance(value, float) and 1e4 <= abs(value) < 1e15):
        return f"{value:,.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _left_out(line: str) -> str:
    why, _, commands = line.partition("\n")
    return f"<p>{escape(why)}</p>" + (f"<pre>{escape(commands)}</pre>" if commands else "")


def page(title: str, lead: str, sections: Sequence[Section], missing: Sequence[str]) -> str:
    """The whole file.

    Args:
        title: plain text.
        lead: HTML below the heading.
        sections: in order.
        missing: for each section that is left out a plain line, and the commands that make it on lines below.
    """
    links = [f'<a href="#{section.name}">{escape(section.title)}</a>' for section in sections]
    parts = [
        f'<section id="{section.name}"><h2>{escape(section.title)}</h2>{section.body}</section>'
        for section in sections
    ]
    if missing:
        lines = "".join(map(_left_out, missing))
        links.append('<a href="#missing">Left out</a>')
        parts.append(f'<section id="missing"><h2>Left out</h2>{lines}</section>')
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>{lead}<nav>{"".join(links)}</nav></header>
<main>
{"".join(parts)}
<footer>Made by scripts/report.py. Everything is in this file: it can be sent and opened without a network.</footer>
</main>
</body>
</html>
"""

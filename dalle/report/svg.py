"""Curves as SVG inside the page, in the page's own colors, so that they can be read on light and dark grounds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dalle.report.html import escape

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 38, 30
MOST = 400
"""Points of a curve that are drawn, at most."""
LARGEST = 1e100
"""Beyond it a value is none that a curve can show: JSON may hold whole numbers that no float holds."""
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    """What the legend calls it."""
    points: Points
    """(x, y) in order of x."""
    style: str = "line"
    """line; dots, joined by a thin line; or level, a dotted line at the first y."""
    color: int = 0
    """Number of a color of the page, 0 to 2."""


def chart(title: str, curves: Sequence[Curve], below: str = "step", doubling: bool = False) -> str:
    """A chart of curves with axes and a legend.

    Args:
        title: plain text above it, and its name for who cannot see it.
        curves: at least one with a point; values that are not finite are left out.
        below: what the horizontal axis counts.
        doubling: x are 1, 2, 4, ...: as far apart as their logarithms, each with its number.

    Raises:
        ValueError: no point is finite.
    """
    across = math.log2 if doubling else float
    curves = [Curve(c.name, thin(finite(c.points)), c.style, c.color) for c in curves]
    xs = [across(x) for c in curves for x, _ in c.points if c.style != "level"]
    ys = [y for c in curves for _, y in c.points]
    if not xs:
        raise ValueError(f"no finite value of {title} to draw")
    x_range, y_range = _widened(min(xs), max(xs), 0), _widened(min(ys), max(ys), 0.06)

    def place(x: float, y: float) -> tuple[float, float]:
        share_x = (across(x) - x_range[0]) / (x_range[1] - x_range[0])
        share_y = (y - y_range[0]) / (y_range[1] - y_range[0])
        return LEFT + share_x * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - share_y * (HEIGHT - TOP - BOTTOM)

    parts = [_text(WIDTH / 2, 14, title, "middle", 12)]
    for y in ticks(*y_range):
        at = place(0 if not doubling else 1, y)[1]
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="var(--line)"/>'
        )
        parts.append(_text(LEFT - 5, at + 3.5, short(y), "end"))
    marks = sorted({x for c in curves for x, _ in c.points}) if doubling else ticks(*x_range, most=5)
    for x in marks:
        parts.append(_text(place(x, y_range[0])[0], HEIGHT - BOTTOM + 13, short(x), "middle"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 4, below, "end"))
    parts += [_drawn(curve, place) for curve in curves if curve.points]
    parts.append(_legend(curves))
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    return (
        f'<div class="card"><svg {size} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></div>'
    )


def _drawn(curve: Curve, place) -> str:
    color = f"var(--c{curve.color})"
    if curve.style == "level":
        y = place(1, curve.points[0][1])[1]
        return (
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{color}" '
            'stroke-dasharray="2 3"/>'
        )
    spots = [place(x, y) for x, y in curve.points]
    dots = curve.style == "dots" or len(spots) == 1
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    drawn = f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="{0.8 if dots else 1.4}"/>'
    return drawn + "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{color}"/>' for x, y in spots * dots
    )


def _legend(curves: Sequence[Curve]) -> str:
    """A line below the title; none for one curve."""
    signs = {"line": "\N{EM DASH}", "dots": "\N{BLACK CIRCLE}", "level": "\N{MIDDLE DOT}" * 3}
    names = [f'<tspan fill="var(--c{c.color})">{signs[c.style]}</tspan> {escape(c.name)}' for c in curves]
    spaced = "\N{NO-BREAK SPACE}\N{NO-BREAK SPACE} ".join(names)
    return (
        f'<text x="{WIDTH / 2}" y="29" text-anchor="middle" {_font(10)}>{spaced}</text>'
        if len(curves) > 1
        else ""
    )


def _text(x: float, y: float, words: str, anchor: str, size: int = 10) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {_font(size)}>{escape(words)}</text>'


def _font(size: int) -> str:
    return f'font-size="{size}" fill="currentColor"'


def finite(points: Points) -> list[tuple[float, float]]:
    """Without those that cannot be drawn."""
    return [(x, y) for x, y in points if abs(x) < LARGEST and abs(y) < LARGEST]  # not so for NaN


def thin(points: Points, most: int = MOST) -> list[tuple[float, float]]:
    """At most so many points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    kept, stretches = [], most // 2
    for i in range(stretches):
        part = points[i * len(points) // stretches : (i + 1) * len(points) // stretches]
        ends = {min(part, key=lambda one: one[1]), max(part, key=lambda one: one[1])}
        kept += sorted(ends)
    return kept


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between two: 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    """The range with room beside it; never empty."""
    room = (high - low) * share or (abs(high) * 0.05 or 0.5) * (high == low)
    return low - room, high + room


def short(value: float) -> str:
    """A number in few letters: 1300 as 1.3k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"

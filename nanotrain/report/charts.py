"""Line, bar and heat charts as inline SVG: no script, no request; colours come from the page's style sheet.

Marks carry a `<title>`, which browsers show on hover and screen readers read.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from nanotrain.report.axes import Scale, format_tick, nice_ticks, padded_range

WIDTH, HEIGHT = 560, 270
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 14, 46
NUM_COLOURS = 6
MAX_BAR_WIDTH = 64.0
MAX_POINTS = 400
MAX_TITLED_POINTS = 60
"""Lines with more points get no hover mark on each: they would be closer than a pointer can tell."""


@dataclass(frozen=True)
class Series:
    """One line or one colour of bars."""

    name: str
    points: Sequence[tuple[float, float]]
    """(x, y); entries that are not finite are left out."""
    dashed: bool = False
    marked: bool = False
    """Draw a dot on every point."""
    colour: int | None = None
    """Index of a colour; None = by position."""
    whiskers: Sequence[tuple[float, float, float]] = ()
    """(x, low, high): intervals drawn as vertical lines."""


@dataclass(frozen=True)
class Marker:
    """A labelled vertical line."""

    x: float
    label: str


def thin(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Return at most `limit` points: means of equal runs of neighbours, the last point kept as it is.

    Points that are not finite are dropped first.
    """
    finite = [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(finite) <= limit:
        return finite
    body, last = finite[:-1], finite[-1]
    edges = [round(index * len(body) / (limit - 1)) for index in range(limit)]
    runs = [body[a:b] for a, b in itertools.pairwise(edges) if b > a]
    means = [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]
    return [*means, last]


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str,
    y_label: str,
    markers: Sequence[Marker] = (),
    y_range: tuple[float, float] | None = None,
    x_ticks: Sequence[tuple[float, str]] | None = None,
) -> str:
    """Return an SVG with one line a series; empty when no series has a finite point.

    Args:
        series: drawn in order.
        label: what the chart shows, for screen readers.
        x_label: with its unit.
        y_label: with its unit.
        markers: vertical lines.
        y_range: bounds of the y axis, instead of the data's own.
        x_ticks: (x, text), instead of round numbers.
    """
    drawn = [(index, one, thin(one.points)) for index, one in enumerate(series)]
    drawn = [(index, one, points) for index, one, points in drawn if points]
    if not drawn:
        return ""
    xs = [x for *_, points in drawn for x, _ in points] + [marker.x for marker in markers]
    ys = [y for *_, points in drawn for _, y in points]
    ys += [bound for _, one, _ in drawn for _, low, high in one.whiskers for bound in (low, high)]
    x_scale = Scale(min(xs), max(xs), LEFT + 4, WIDTH - RIGHT - 4)
    y_scale = Scale(*(y_range or padded_range(ys)), HEIGHT - BOTTOM, TOP)
    ticks = x_ticks if x_ticks is not None else [(x, format_tick(x)) for x in nice_ticks(min(xs), max(xs), 6)]
    parts = _frame(x_scale, y_scale, ticks, x_label, y_label)
    for marker in markers:
        x = x_scale(marker.x)
        side, offset = ("end", -4) if x > WIDTH * 0.6 else ("start", 4)
        parts.append(f'<line class="marker" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(_text(x + offset, TOP + 10, marker.label, anchor=side, css="note"))
    for index, one, points in drawn:
        parts.extend(_line(one, points, index if one.colour is None else one.colour, x_scale, y_scale))
    return _svg(label, parts, legend=[(s.name, i if s.colour is None else s.colour, s.dashed) for i, s, _ in drawn])


def _line(one: Series, points: list[tuple[float, float]], index: int, x_scale: Scale, y_scale: Scale) -> list[str]:
    colour = f"c{index % NUM_COLOURS}"
    path = " ".join(f"{'M' if i == 0 else 'L'}{x_scale(x):.1f} {y_scale(y):.1f}" for i, (x, y) in enumerate(points))
    dash = " dashed" if one.dashed else ""
    parts = [f'<path class="line {colour}{dash}" d="{path}"><title>{escape(one.name)}</title></path>']
    for x, low, high in one.whiskers:
        across = f'x1="{x_scale(x):.1f}" x2="{x_scale(x):.1f}"'
        parts.append(f'<line class="whisker {colour}" {across} y1="{y_scale(low):.1f}" y2="{y_scale(high):.1f}"/>')
    if one.marked or len(points) <= MAX_TITLED_POINTS:
        radius, css = (3.2, "dot") if one.marked or len(points) == 1 else (5, "dot ghost")
        for x, y in points:
            title = f"{one.name}: {y:.6g} at {format_tick(x)}"
            parts.append(
                f'<circle class="{css} {colour}" cx="{x_scale(x):.1f}" cy="{y_scale(y):.1f}" r="{radius}">'
                f"<title>{escape(title)}</title></circle>"
            )
    return parts


@dataclass(frozen=True)
class Bar:
    """One bar; bars of one colour share a meaning."""

    label: str
    value: float
    colour: int = 0
    pale: bool = False
    """Drawn as an outline: for what was removed or not chosen."""
    title: str = ""


def bar_chart(
    bars: Sequence[Bar], *, label: str, x_label: str, y_label: str, legend: Sequence[tuple[str, int]] = ()
) -> str:
    """Return an SVG with one vertical bar an entry, from zero; empty when nothing is finite."""
    finite = [bar for bar in bars if math.isfinite(bar.value)]
    if not finite:
        return ""
    y_scale = Scale(*padded_range([bar.value for bar in finite], from_zero=True), HEIGHT - BOTTOM, TOP)
    x_scale = Scale(0, len(finite), LEFT + 4, WIDTH - RIGHT - 4)
    every = max(1, math.ceil(len(finite) * max(len(bar.label) for bar in finite) * 8 / (WIDTH - LEFT - RIGHT)))
    ticks = [(index + 0.5, bar.label) for index, bar in enumerate(finite) if index % every == 0]
    parts = _frame(x_scale, y_scale, ticks, x_label, y_label)
    gap = min(6.0, (x_scale(1) - x_scale(0)) * 0.2)
    for index, bar in enumerate(finite):
        top, bottom = sorted((y_scale(bar.value), y_scale(0)))
        width = min(x_scale(1) - x_scale(0) - gap, MAX_BAR_WIDTH)
        left = x_scale(index + 0.5) - width / 2
        css = f"bar c{bar.colour % NUM_COLOURS}{' pale' if bar.pale else ''}"
        parts.append(
            f'<rect class="{css}" x="{left:.1f}" y="{top:.1f}" width="{max(width, 0.5):.1f}"'
            f' height="{max(bottom - top, 0.5):.1f}">'
            f"<title>{escape(bar.title or f'{bar.label}: {bar.value:.6g}')}</title></rect>"
        )
    return _svg(label, parts, legend=[(name, colour, False) for name, colour in legend])


def heat_chart(rows: Sequence[tuple[str, Sequence[float]]], *, label: str, x_label: str, y_label: str) -> str:
    """Return an SVG with one strip of cells a row, shaded from 0 to the row's own largest value.

    Args:
        rows: (name, values); rows may differ in length.
        label: what the chart shows.
        x_label: of the cells' index.
        y_label: of the rows' names.
    """
    if not rows or not any(len(values) for _, values in rows):
        return ""
    longest = max(len(values) for _, values in rows)
    height = TOP + BOTTOM + max(12, min(26, 240 // len(rows))) * len(rows)
    x_scale = Scale(0, longest, LEFT + 4, WIDTH - RIGHT - 4)
    y_scale = Scale(0, len(rows), TOP, height - BOTTOM)
    parts = []
    for number, (name, values) in enumerate(rows):
        parts.append(_text(LEFT - 4, y_scale(number + 0.5) + 4, name, anchor="end", css="tick"))
        largest = max((value for value in values if math.isfinite(value)), default=0.0)
        for index, value in enumerate(values):
            share = value / largest if largest > 0 and math.isfinite(value) else 0.0
            parts.append(
                f'<rect class="cell" x="{x_scale(index) + 0.5:.1f}" y="{y_scale(number) + 0.5:.1f}"'
                f' width="{x_scale(1) - x_scale(0) - 1:.1f}" height="{y_scale(1) - y_scale(0) - 1:.1f}"'
                f' fill-opacity="{max(share, 0.0) * 0.94 + 0.06:.2f}">'
                f"<title>{escape(f'{name}, {index}: {value:.4g}')}</title></rect>"
            )
    for tick in nice_ticks(0, longest - 1, 8):
        if tick == int(tick):
            parts.append(_text(x_scale(tick + 0.5), height - BOTTOM + 16, format_tick(tick), css="tick"))
    parts += [_text((LEFT + WIDTH - RIGHT) / 2, height - 8, x_label, css="axis"), _y_label(y_label, height)]
    return _svg(label, parts, legend=[], height=height)


def _frame(
    x_scale: Scale, y_scale: Scale, x_ticks: Sequence[tuple[float, str]], x_label: str, y_label: str
) -> list[str]:
    parts = []
    for value in nice_ticks(y_scale.low, y_scale.high, 5):
        y = y_scale(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 7, y + 4, format_tick(value), anchor="end", css="tick"))
    bottom = HEIGHT - BOTTOM
    parts.append(f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    for value, text in x_ticks:
        parts.append(_text(x_scale(value), bottom + 17, text, css="tick"))
    parts += [_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, css="axis"), _y_label(y_label, HEIGHT)]
    return parts


def _y_label(text: str, height: int) -> str:
    middle = (TOP + height - BOTTOM) / 2
    turn = f"translate(12 {middle:.0f}) rotate(-90)"
    return f'<text class="axis" text-anchor="middle" transform="{turn}">{escape(text)}</text>'


def _text(x: float, y: float, text: str, *, anchor: str = "middle", css: str) -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(label: str, parts: list[str], *, legend: Sequence[tuple[str, int, bool]], height: int = HEIGHT) -> str:
    body = "".join(parts)
    svg = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'
    if len(legend) < 2:
        return svg
    items = "".join(
        f'<li><i class="key c{colour % NUM_COLOURS}{" dashed" if dashed else ""}"></i>{escape(name)}</li>'
        for name, colour, dashed in legend
    )
    return f'{svg}<ul class="legend">{items}</ul>'

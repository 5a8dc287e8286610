"""The plots of a benchmark as SVG: for the page, which colours them, and as files of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from lsync_compile.quality.plots import axis

WIDTH, HEIGHT = 920, 380
LEFT, RIGHT, TOP, BOTTOM = 62, 24, 18, 44
BAR, GAP, NAMES, LETTER = 22, 10, 230, 7

# For files of their own, which no page's style sheet reaches.
STYLE = """<style>
svg { background: #fff; } text { fill: #444; font: 12px system-ui, sans-serif; }
path { fill: none; } .grid { stroke: #e5e5e5; } .level { stroke: #888; stroke-dasharray: 6 4; }
.s0 { fill: #c2410c; } .s1 { fill: #1d4ed8; } .s2 { fill: #15803d; } .s3 { fill: #a21caf; }
.front { stroke: #1d4ed8; stroke-width: 1.5; stroke-dasharray: 3 3; } path.s1 { fill: none; }
</style>"""


@dataclass(frozen=True)
class Point:
    """A row of a scatter plot; ``style`` is a CSS class."""

    name: str
    x: float
    y: float
    style: str


@dataclass(frozen=True)
class Bar:
    """A row of stacked bars: (length, CSS class) of each part."""

    name: str
    parts: Sequence[tuple[float, str]]
    label: str = ""


def scatter(
    points: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    levels: Sequence[tuple[str, float]] = (),
    log: bool = False,
    roof: tuple[float, float] | None = None,
    front: bool = False,
) -> str:
    """Points with their names, as an ``<svg>`` element.

    Args:
        points: what to draw; those that are not finite are left out.
        x_label, y_label: with the unit.
        levels: horizontal lines with a name.
        log: both axes logarithmic.
        roof: of a roofline: y per x on the slope, and y where it is flat.
        front: join the points that no other one beats in both directions, more being better.
    """
    points = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
    if log:
        points = [p for p in points if p.x > 0 and p.y > 0]

    def scaled(value: float) -> float:
        return math.log10(value) if log else value

    xs = [scaled(p.x) for p in points] or [0.0, 1.0]
    ys = [scaled(p.y) for p in points] or [0.0, 1.0]
    ys += [scaled(value) for _, value in levels]
    if roof:
        xs.append(scaled(roof[1] / roof[0]))
        ys.append(scaled(roof[1]))
    x_low, x_high, x_step = axis(min([*xs, *([] if log else [0.0])]), max(xs) + 0.05)
    y_low, y_high, y_step = axis(min(ys), max(ys))

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (scaled(value) - x_low) / (x_high - x_low)

    def y(value: float) -> float:
        share = (scaled(value) - y_low) / (y_high - y_low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(max(share, 0.0), 1.0)

    parts = [_open(HEIGHT, f"{y_label} by {x_label}")]
    for number in range(round((y_high - y_low) / y_step) + 1):
        value = _unscaled(y_low + number * y_step, log)
        parts.append(f'<path class="grid" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 7, y(value) + 4, _tick(value), "end"))
    for number in range(round((x_high - x_low) / x_step) + 1):
        value = _unscaled(x_low + number * x_step, log)
        parts.append(_text(x(value), HEIGHT - BOTTOM + 17, _tick(value), "middle"))
    for name, value in levels:
        parts.append(f'<path class="level" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(WIDTH - RIGHT - 4, y(value) - 4, name, "end"))
    if roof:
        low, ridge = _unscaled(x_low, log), roof[1] / roof[0]
        start = f"M{x(low):.1f} {y(max(low * roof[0], _unscaled(y_low, log))):.1f}"
        parts.append(
            f'<path class="level" d="{start}L{x(ridge):.1f} {y(roof[1]):.1f}H{WIDTH - RIGHT}"/>'
        )
    if front and points:
        best = [p for p in points if not any(_beats(other, p) for other in points)]
        best.sort(key=lambda p: p.x)
        line = " L".join(f"{x(p.x):.1f} {y(p.y):.1f}" for p in best)
        parts.append(f'<path class="front" d="M{line}"/>')
    taken: list[tuple[float, float]] = []
    for point in points:
        px, py = x(point.x), y(point.y)
        below = py
        while any(
            abs(below - other_y) < 13 and abs(px - other_x) < 150 for other_x, other_y in taken
        ):
            below += 13
        taken.append((px, below))
        parts.append(f'<circle class="{point.style}" cx="{px:.1f}" cy="{py:.1f}" r="5"/>')
        beyond = px > WIDTH - 170
        parts.append(
            _text(px - 9 if beyond else px + 9, below + 4, point.name, "end" if beyond else "start")
        )
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "middle"))
    parts.append(
        f'<text transform="translate(15 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text></svg>'
    )
    return "".join(parts)


def bars(rows: Sequence[Bar], *, x_label: str, level: tuple[str, float] | None = None) -> str:
    """Stacked horizontal bars, as an ``<svg>`` element; ``level`` is a vertical line."""
    longest = max((sum(length for length, _ in row.parts) for row in rows), default=1.0)
    _, high, step = axis(0.0, max(longest, level[1] if level else 0.0, 1e-9))
    height = TOP + BOTTOM + len(rows) * (BAR + GAP)

    def x(value: float) -> float:
        return NAMES + (WIDTH - NAMES - 90) * value / high

    parts = [_open(height, x_label)]
    for number in range(round(high / step) + 1):
        place = x(number * step)
        parts.append(f'<path class="grid" d="M{place:.1f} {TOP}V{height - BOTTOM}"/>')
        parts.append(_text(place, height - BOTTOM + 16, f"{number * step:.5g}", "middle"))
    for place, row in enumerate(rows):
        top, start = TOP + place * (BAR + GAP) + GAP / 2, 0.0
        parts.append(_text(NAMES - 8, top + BAR - 6, row.name, "end"))
        for length, style in row.parts:
            parts.append(
                f'<rect class="{style}" x="{x(start):.1f}" y="{top:.1f}" '
                f'width="{max(x(start + length) - x(start), 0):.1f}" height="{BAR}"/>'
            )
            start += length
        beside = x(start) + 6
        if level is not None and beside < x(level[1]) < beside + LETTER * len(row.label):
            beside = x(level[1]) + 6  # past the line, which would run through it
        parts.append(_text(beside, top + BAR - 6, row.label, "start"))
    if level is not None:
        name, value = level
        parts.append(f'<path class="level" d="M{x(value):.1f} {TOP - 8}V{height - BOTTOM}"/>')
        parts.append(_text(x(value) + 4, TOP - 4, name, "start"))
    parts.append(_text((NAMES + WIDTH) / 2, height - 8, x_label, "middle"))
    return "".join(parts) + "</svg>"


def alone(svg: str) -> str:
    """A plot as a file of its own."""
    return svg.replace(">", ">" + STYLE, 1).replace(
        "<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1
    )


def _beats(other: Point, point: Point) -> bool:
    as_good = other.x >= point.x and other.y >= point.y
    return as_good and (other.x, other.y) != (point.x, point.y)


def _unscaled(value: float, log: bool) -> float:
    return 10.0**value if log else value


def _tick(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _open(height: float, label: str) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(label)}">'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'

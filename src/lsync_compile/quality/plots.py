"""Line plots as inline SVG, coloured by the page's style sheet so that they follow light and dark.

A page that must open offline, in either colour scheme, is served better by a few lines of SVG than
by a plotting library's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 920, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 34


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Attributes:
        name: for the legend.
        values: y at x = 0, 1, …; NaN leaves a gap, infinity is drawn at the upper edge.
        style: name of a CSS class.
        filled: fill the area below.
    """

    name: str
    values: Sequence[float]
    style: str
    filled: bool = False


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with."""

    name: str
    value: float


def line_plot(
    lines: Sequence[Line],
    *,
    y_label: str,
    x_label: str = "frame",
    levels: Sequence[Level] = (),
    marks: Sequence[int] = (),
) -> str:
    """A plot as an ``<svg>`` element.

    Args:
        lines: what to draw, the first lowest.
        y_label: with the unit.
        x_label: with the unit.
        levels: horizontal lines with a name.
        marks: x positions of faint vertical lines.
    """
    count = max((len(line.values) for line in lines), default=0)
    finite = [v for line in lines for v in line.values if math.isfinite(v)]
    finite += [level.value for level in levels if math.isfinite(level.value)]
    low, high, step = axis(min(finite, default=0.0), max(finite, default=1.0))

    def x(position: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * position / max(count - 1, 1)

    def y(value: float) -> float:
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share

    parts = [
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(y_label)} by {escape(x_label)}">'
    ]
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for index in range(round((high - low) / step) + 1):
        value = low + index * step
        parts.append(f'<path class="grid" d="M{_LEFT} {y(value):.1f}H{right}"/>')
        parts.append(_text(_LEFT - 7, y(value) + 4, f"{value:.6g}", "end"))
    for position in _ticks(count):
        parts.append(_text(x(position), bottom + 16, str(position), "middle"))
    parts += [f'<path class="mark" d="M{x(m):.1f} {_TOP}V{bottom}"/>' for m in marks]
    for line in lines:
        for run in _runs(line.values):
            points = " L".join(f"{x(i):.1f} {y(line.values[i]):.1f}" for i in run)
            if line.filled:
                area = f"M{x(run[0]):.1f} {bottom} L{points} L{x(run[-1]):.1f} {bottom}Z"
                parts.append(f'<path class="area {line.style}" d="{area}"/>')
            else:
                parts.append(f'<path class="line {line.style}" d="M{points}"/>')
    for level in levels:
        if math.isfinite(level.value):
            height = y(level.value)
            parts.append(f'<path class="level" d="M{_LEFT} {height:.1f}H{right}"/>')
            parts.append(_text(right - 4, height - 4, f"{level.name} {level.value:.1f}", "end"))
    parts.append(_text((_LEFT + right) / 2, _HEIGHT - 3, x_label, "middle"))
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text transform="translate(13 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text></svg>"
    )
    return "".join(parts)


def axis(low: float, high: float) -> tuple[float, float, float]:
    """Round limits around a range, and a step of 1, 2 or 5 times a power of ten."""
    span = max(high - low, 1e-9, abs(high) * 1e-3)
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * 5 >= span)
    bottom = math.floor(low / step) * step
    top = math.ceil(high / step) * step
    return bottom, top if top > bottom else bottom + step, step


def _ticks(count: int) -> range:
    step = next((s for s in (1, 2, 5, 10, 20, 25, 50, 100, 250, 500) if count / s <= 13), 1000)
    return range(0, count, step)


def _runs(values: Sequence[float]) -> list[list[int]]:
    """Stretches of positions without NaN."""
    runs: list[list[int]] = [[]]
    for index, value in enumerate(values):
        if math.isnan(value):
            runs.append([])
        else:
            runs[-1].append(index)
    return [run for run in runs if run]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'

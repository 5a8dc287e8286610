"""A picture of a Chrome trace: one row for each kind of work, one colour for each chunk.

SVG written by hand, so that it needs no library for plots.
"""

from __future__ import annotations

from html import escape
from typing import Any

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")
WIDTH, ROW, LEFT, TOP = 1000, 26, 80, 8


def draw(trace: dict[str, Any], *, begin: float = 0.0, end: float | None = None) -> str:
    """The SVG of the work between two times.

    Args:
        trace: in the trace-event format, with a "thread_name" for each row.
        begin: seconds.
        end: seconds; None is the end of the trace.

    Raises:
        ValueError: nothing was done between the two.
    """
    events = trace["traceEvents"]
    rows = {each["tid"]: each["args"]["name"] for each in events if each["ph"] == "M"}
    work = [each for each in events if each["ph"] == "X"]
    last = max((each["ts"] + each["dur"] for each in work), default=0.0) / 1e6
    end = last if end is None else min(end, last)
    if end <= begin:
        raise ValueError(f"nothing was done between {begin} s and {end} s")
    scale = (WIDTH - LEFT) / (end - begin)
    height = TOP + ROW * len(rows) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for row, name in rows.items():
        parts.append(f'<text x="6" y="{TOP + ROW * row + 17}">{escape(name)}</text>')
    for each in work:
        start, stop = each["ts"] / 1e6, (each["ts"] + each["dur"]) / 1e6
        start, stop = max(start, begin), min(stop, end)
        if stop <= start:
            continue
        chunk = each["args"]["chunk"]
        parts.append(
            f'<rect x="{LEFT + (start - begin) * scale:.2f}" y="{TOP + ROW * each["tid"] + 2}" '
            f'width="{max(0.4, (stop - start) * scale):.2f}" height="{ROW - 4}" '
            f'fill="{COLOURS[chunk % len(COLOURS)]}"><title>{escape(each["name"])}: '
            f"{1000 * (stop - start):.1f} ms</title></rect>"
        )
    foot = TOP + ROW * len(rows) + 20
    for tenth in range(0, 11, 2):
        at = begin + (end - begin) * tenth / 10
        anchor = "end" if tenth == 10 else "middle"
        parts.append(
            f'<text x="{LEFT + (at - begin) * scale:.1f}" y="{foot}" text-anchor="{anchor}">'
            f"{at:.1f} s</text>"
        )
    return "\n".join([*parts, "</svg>\n"])

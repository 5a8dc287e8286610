"""The pictures of `lsync bench`."""

from __future__ import annotations

import re

from lsync_compile.bench.plots import Bar, bars


def test_no_label_of_a_bar_is_crossed_by_the_level() -> None:
    """Whatever its length: a label begins behind the line, or ends before it."""
    rows = [Bar("row", [(float(length), "s0")], "55.5/s") for length in range(0, 1000, 20)]
    svg = bars(rows, x_label="ms", level=("real time", 640.0))
    (line,) = (float(x) for x in re.findall(r'class="level" d="M([\d.]+)', svg))
    places = [float(x) for x in re.findall(r'<text x="([\d.]+)"[^>]*>55\.5/s<', svg)]
    assert len(places) == len(rows)
    assert all(place > line or place + 6 * 6 < line for place in places)
    assert places[0] < line < places[-1]

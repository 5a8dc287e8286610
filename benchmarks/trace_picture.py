"""A picture of a Chrome trace: one row for each kind of work, one colour for each chunk.

    python benchmarks/trace_picture.py trace.json [picture.svg] [--begin 2 --end 6]

SVG written by hand, so that it needs no library for plots.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lsync_compile.bench.trace import draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path, nargs="?", help="default: beside the trace")
    parser.add_argument("--begin", type=float, default=0.0, help="seconds")
    parser.add_argument("--end", type=float, help="seconds")
    arguments = parser.parse_args()
    picture = arguments.picture or arguments.trace.with_suffix(".svg")
    trace = json.loads(arguments.trace.read_text())
    picture.write_text(draw(trace, begin=arguments.begin, end=arguments.end))
    print(f"wrote {picture}")


if __name__ == "__main__":
    main()

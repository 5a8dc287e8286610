"""A benchmark's figures and plots as one page that opens offline, in light and dark."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lsync_compile.bench.plots import alone
from lsync_compile.bench.tables import (
    HEADINGS,
    cells,
    jobs,
    joined,
    machine_words,
    markdown,
    newest,
    notes,
    plots,
    speedup,
)
from lsync_compile.bench.trace import draw
from lsync_compile.files import write_whole
from lsync_compile.options import PRESETS
from lsync_compile.quality.extra import require

TITLES = {
    "pareto": (
        "Speed against quality",
        "Further up and to the right is better; the dotted line joins rows that none beats.",
    ),
    "chunk": ("A chunk", "Where its time goes: encode, denoise, decode."),
    "waterfall": ("Exact optimisations", "Each added to those before it."),
    "roofline": (
        "Roofline",
        "Arithmetic per second over what the eager network moves for each; the roof is a large "
        "matrix product and a copy, measured in the same run. Fused rows move less than that.",
    ),
}

JOB = "The job that is timed; a colour for each chunk."


def write_all(folder: Path, sections: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write ``bench.md``, a picture for each plot and, with jinja2, ``bench.html``.

    Raises:
        MediaError: the folder cannot be written to.
    """
    texts = {"bench.md": markdown(sections)}
    drawn = plots(sections)
    texts.update({f"{name}.svg": alone(svg) for name, svg in drawn.items()})
    timelines = {path.stem: draw(json.loads(path.read_text())) for path in traces(folder)}
    texts.update({f"{name}.svg": svg for name, svg in timelines.items()})
    if importlib.util.find_spec("jinja2") is not None:
        texts["bench.html"] = render(sections, drawn, timelines)
    written = []
    for name, text in texts.items():
        path = folder / name
        write_whole(path, text, make_folder=True)
        written.append(path)
    return written


def traces(folder: Path) -> list[Path]:
    """The timelines of whole jobs that lie beside the results."""
    return sorted(folder.glob("timeline-*.json"))


def render(
    sections: Sequence[Mapping[str, Any]],
    drawn: Mapping[str, str],
    timelines: Mapping[str, str],
) -> str:
    """The page as text.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    require("jinja2")
    jinja2: Any = importlib.import_module("jinja2")
    source = files("lsync_compile.bench").joinpath("templates", "bench.html")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    rows = joined(sections)
    speed = newest(sections, "speed") or newest(sections, "quality")
    cards = []
    for row in rows:
        gain = speedup(row, rows)
        if row.name in PRESETS and row.fps is not None:
            words = f"{row.name}: frames/s of UNet and VAE"
            cards.append(
                (f"{row.fps:.1f}", words + (f", {gain:.1f}x the original" if gain else ""))
            )
    page: str = environment.from_string(source.read_text(encoding="utf-8")).render(
        machine=machine_words(speed) if speed else "nothing measured yet",
        cards=cards,
        headings=HEADINGS,
        rows=[cells(row) for row in rows],
        notes=notes(sections),
        plots=[
            *((*TITLES[name], drawn[name]) for name in TITLES if name in drawn),
            *((name.replace("-", " "), JOB, svg) for name, svg in timelines.items()),
        ],
        jobs=jobs(sections),
    )
    return page

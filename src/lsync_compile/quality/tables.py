"""A study as tables, the same for the terminal and the page."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from lsync_compile.quality.compare import Result, Study
from lsync_compile.quality.metrics import Measure
from lsync_compile.quality.scores import MEASURES, SAMPLED, Scores
from lsync_compile.quality.sync import Sync

# Heading and digits after the point of each measure.
_HEADINGS = {
    "psnr": ("PSNR", 2),
    "worst_psnr": ("worst", 2),
    "ssim": ("SSIM", 4),
    "ms_ssim": ("MS-SSIM", 4),
    "lpips": ("LPIPS", 4),
    "flicker": ("flicker", 3),
    "seams": ("seams", 2),
}
_REGIONS = {"mouth": "Mouth region", "frame": "Full frame"}
_MISSING, _INFINITE = "n/a", "∞"


@dataclass(frozen=True)
class Table:
    """Rows of text under headings.

    Attributes:
        title: what the rows show.
        headings: one for each column.
        rows: cells; the first of a row is its name.
        faint: names of the rows that are there to compare with.
        notes: what needs a word, such as why a figure is missing.
    """

    title: str
    headings: list[str]
    rows: list[list[str]]
    faint: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def study_tables(study: Study) -> list[Table]:
    """All tables of a study, the most telling first."""
    floors = {floor.name: floor.scores for floor in study.floors}
    reference, name = study.reference, study.reference.setting.name
    against_reference = {c.setting.name: c.against_reference for c in study.candidates}
    against_original = {r.setting.name: r.against_original for r in (reference, *study.candidates)}
    tables = [_speed_table(study)]
    for region, title in _REGIONS.items():
        rows = {row: scores[region] for row, scores in (against_reference | floors).items()}
        tables.append(
            _scores_table(f"{title} against {name}", rows, set(floors), sampled=region == "frame")
        )
    if study.clip.has_truth:
        for region, title in _REGIONS.items():
            rows = {row: scores[region] for row, scores in against_original.items()}
            tables.append(
                _scores_table(
                    f"{title} against the original", rows, {name}, sampled=region == "frame"
                )
            )
    tables.append(_sync_table(study))
    return [table for table in tables if table.rows]


def print_tables(study: Study, console: Console) -> None:
    """Print a study's tables with their notes."""
    for table in study_tables(study):
        rich = RichTable(
            title=table.title,
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for index, heading in enumerate(table.headings):
            rich.add_column(heading, justify="right" if index else "left", no_wrap=True)
        for row in table.rows:
            rich.add_row(*row, style="dim" if row[0] in table.faint else None)
        console.print(rich)
        for note in table.notes:
            console.print(f"  {note}", style="dim", highlight=False)
        console.print()


def number(value: float, digits: int) -> str:
    """A figure for people: n/a for NaN, ∞ for infinity."""
    if math.isnan(value):
        return _MISSING
    return f"{value:.{digits}f}" if math.isfinite(value) else _INFINITE


def _speed_table(study: Study) -> Table:
    base = study.reference
    rows = [_speed_row(result, base) for result in (base, *study.candidates)]
    headings = ["", "solver", "steps", "guidance", "seconds", "frames/s", "speed-up"]
    notes = ["seconds: all chunks, compiling included; frames/s: the median full chunk"]
    for result in study.candidates:
        options = result.setting.options or {}
        if options:
            words = " ".join(f"{key}={value}" for key, value in options.items())
            notes.append(f"{result.setting.name}: {words}")
    return Table("Speed", headings, rows, {base.setting.name}, notes)


def _speed_row(result: Result, base: Result) -> list[str]:
    setting = result.setting
    return [
        setting.name,
        setting.solver + (f" {setting.spacing}" if setting.spacing else ""),
        str(setting.steps),
        f"{setting.guidance_scale:g}",
        f"{result.seconds:.1f}",
        f"{result.frames_per_second:.2f}",
        f"{result.frames_per_second / base.frames_per_second:.2f}x",
    ]


def _scores_table(title: str, rows: dict[str, Scores], faint: set[str], *, sampled: bool) -> Table:
    # A dictionary, to keep the order and say nothing twice.
    notes: dict[str, None] = {"PSNR and worst frame in dB, flicker in levels of 255": None}
    cells = []
    for name, scores in rows.items():
        measures: dict[str, Measure] = {key: getattr(scores, key) for key in MEASURES}
        cells.append([name, *(number(m.value, _HEADINGS[key][1]) for key, m in measures.items())])
        for key, measure in measures.items():
            if math.isnan(measure.value) and measure.note:
                notes[f"{_HEADINGS[key][0]}: {measure.note}"] = None
    if sampled and any(len(scores.frames_psnr) > SAMPLED for scores in rows.values()):
        notes[f"SSIM, MS-SSIM and LPIPS: of {SAMPLED} frames, evenly spread"] = None
    headings = ["", *(_HEADINGS[key][0] for key in MEASURES)]
    return Table(title, headings, cells, faint, list(notes))


def _sync_table(study: Study) -> Table:
    syncs = {"original": study.original_sync}
    for result in (study.reference, *study.candidates):
        syncs[result.setting.name] = result.sync
    faint = {"original", study.reference.setting.name}
    notes = ["chance: what an unrelated mouth reaches; offset: positive if the mouth is late"]
    if not study.clip.has_truth:
        notes.append("original: the clip's mouth said something else")
    notes += [f"{name}: {sync.note}" for name, sync in syncs.items() if sync.note]
    headings = ["", "correlation", "best", "offset, frames", "chance", "movement"]
    rows = [[name, *_sync_cells(sync)] for name, sync in syncs.items()]
    return Table("Mouth opening against the sound", headings, rows, faint, notes)


def _sync_cells(sync: Sync) -> list[str]:
    return [
        number(sync.correlation, 3),
        number(sync.best, 3),
        _MISSING if math.isnan(sync.best) else f"{sync.offset:+d}",
        number(sync.chance, 3),
        number(sync.movement, 3),
    ]

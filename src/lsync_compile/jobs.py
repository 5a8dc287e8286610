"""Many clips with one set of loaded models: ``lsync sync --jobs list.csv``.

The list is a CSV file with the columns ``video``, ``audio`` (empty for the clip's own sound) and
``output``; relative paths are from the list's folder. A clip that fails is reported and the next
one begins. An output that exists is finished, since outputs appear whole or not at all; such clips
are skipped, so an interrupted list goes on where it was.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from lsync_compile.errors import Interrupted, LsyncError, MediaError, OptionError
from lsync_compile.report import Report

_COLUMNS = ("video", "audio", "output")


@dataclass(frozen=True)
class ListedJob:
    """One line of a list."""

    line: int
    video: Path
    audio: Path | None
    output: Path


@dataclass(frozen=True)
class JobOutcome:
    """What became of a line: "done", "skipped" because its output exists, or "failed"."""

    line: int
    output: str
    state: Literal["done", "skipped", "failed"]
    frames: int = 0
    frames_without_face: int = 0
    seconds: float = 0.0
    error: str = ""


def read_jobs(path: Path) -> list[ListedJob]:
    """The jobs of a list.

    Raises:
        MediaError: it cannot be read.
        OptionError: a column or a value is missing, or two lines write the same file.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
            columns = reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MediaError(f"--jobs {path}: cannot be read: {error}") from error
    missing = [name for name in _COLUMNS if name not in columns]
    if missing:
        raise OptionError(
            f"--jobs {path}: its first line must name the columns {', '.join(_COLUMNS)}; "
            f"{', '.join(missing)} missing"
        )
    jobs: dict[Path, ListedJob] = {}
    for line, row in rows:
        video, audio, output = ((row[name] or "").strip() for name in _COLUMNS)
        if not (video and output):
            raise OptionError(f"--jobs {path}, line {line}: video and output must be given")
        where = path.parent / output
        if where in jobs:
            raise OptionError(
                f"--jobs {path}, line {line}: {output} is written by line {jobs[where].line} too"
            )
        sound = path.parent / audio if audio else None
        jobs[where] = ListedJob(line, path.parent / video, sound, where)
    if not jobs:
        raise OptionError(f"--jobs {path}: lists no clip")
    return list(jobs.values())


def run_jobs(
    jobs: Iterable[ListedJob],
    sync: Callable[[ListedJob], Any],
    *,
    redo: bool = False,
    tell: Callable[[JobOutcome], None] = lambda outcome: None,
) -> list[JobOutcome]:
    """Do the jobs one after the other.

    Args:
        jobs: from :func:`read_jobs`.
        sync: does one, and returns a ``LipsyncOutput``.
        redo: also those whose output exists.
        tell: called with each outcome as it is known.

    Raises:
        Interrupted: the user wants to stop; what is finished stays.
    """
    outcomes = []
    for job in jobs:
        outcome = _outcome(job, sync, redo)
        outcomes.append(outcome)
        tell(outcome)
    return outcomes


def _outcome(job: ListedJob, sync: Callable[[ListedJob], Any], redo: bool) -> JobOutcome:
    if job.output.exists() and not redo:
        return JobOutcome(job.line, str(job.output), "skipped")
    begin = time.perf_counter()
    try:
        result = sync(job)
    except Interrupted:
        raise
    except LsyncError as error:
        seconds = round(time.perf_counter() - begin, 3)
        return JobOutcome(job.line, str(job.output), "failed", seconds=seconds, error=str(error))
    return JobOutcome(
        job.line,
        str(job.output),
        "done",
        frames=result.num_frames,
        frames_without_face=result.missing_faces,
        seconds=round(result.seconds, 3),
    )


def tell_outcome(console: Console, outcome: JobOutcome) -> None:
    """Print one line."""
    said = outcome.error or f"{outcome.frames} frames in {outcome.seconds:.1f} s"
    detail = "" if outcome.state == "skipped" else f" ({said})"
    console.print(escape(f"{outcome.output}: {outcome.state}{detail}"))


def summarise(
    outcomes: list[JobOutcome], done: Report | None, report: Path | None, as_json: bool, quiet: bool
) -> None:
    """Say what became of a list.

    Args:
        outcomes: of its lines.
        done: the report of the compiled pipeline, None for a plain one.
        report: file for it all as JSON.
        as_json: print that too.
        quiet: print nothing.

    Raises:
        typer.Exit: with code 1, where a clip failed.
    """
    states = [outcome.state for outcome in outcomes]
    summary = {
        "jobs": [asdict(outcome) for outcome in outcomes],
        **{state: states.count(state) for state in ("done", "skipped", "failed")},
        "report": None if done is None else done.to_dict(),
    }
    if report is not None:
        report.write_text(json.dumps(summary, indent=2) + "\n")
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    elif not quiet:
        counts = (f"{states.count(state)} {state}" for state in ("done", "skipped", "failed"))
        typer.echo(f"{len(states)} clips: {', '.join(counts)}")
    if "failed" in states:
        raise typer.Exit(1)

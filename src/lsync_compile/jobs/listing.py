"""Lists of clips: what ``lsync sync --jobs`` reads, and what became of each line."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lsync_compile.errors import Interrupted, LsyncError, MediaError, OptionError

_COLUMNS = ("video", "audio", "output")


@dataclass(frozen=True)
class ListedJob:
    """One line of a list.

    Attributes:
        line: its number in the file, from 1.
        video: the clip.
        audio: the speech; None for the clip's own sound.
        output: the file to write.
    """

    line: int
    video: Path
    audio: Path | None
    output: Path


@dataclass(frozen=True)
class JobOutcome:
    """What became of a line.

    Attributes:
        line: its number in the file.
        output: the file that was to be written.
        state: "done", "skipped" because the output existed, or "failed".
        frames: written.
        frames_without_face: of these, passed through unchanged.
        seconds: wall time, from the first read to the finished file or the error.
        error: why it failed, in one line.
        device: where it was done.
        attempts: how often it was begun; 2 where the first worker died of it.
    """

    line: int
    output: str
    state: Literal["done", "skipped", "failed"]
    frames: int = 0
    frames_without_face: int = 0
    seconds: float = 0.0
    error: str = ""
    device: str = ""
    attempts: int = 1


def read_jobs(path: Path) -> list[ListedJob]:
    """The jobs of a CSV file with the columns ``video``, ``audio`` and ``output``.

    ``audio`` is empty for a clip's own sound. Relative paths are from the file's folder.

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
    device: str = "",
    tell: Callable[[JobOutcome], None] = lambda outcome: None,
) -> list[JobOutcome]:
    """Do jobs one after the other in this process.

    Args:
        jobs: from :func:`read_jobs`.
        sync: does one, and returns a ``LipsyncOutput``.
        redo: also those whose output exists.
        device: for the outcomes.
        tell: called with each outcome as it is known.

    Raises:
        Interrupted: the user wants to stop; what is finished stays.
    """
    outcomes = []
    for job in jobs:
        outcome = do_job(job, sync, redo=redo, device=device)
        outcomes.append(outcome)
        tell(outcome)
    return outcomes


def do_job(
    job: ListedJob,
    sync: Callable[[ListedJob], Any],
    *,
    redo: bool = False,
    device: str = "",
    attempts: int = 1,
) -> JobOutcome:
    """Do one job, unless its output exists; an error of the clip's is an outcome too.

    An output that exists is finished, since outputs appear whole or not at all.

    Raises:
        Interrupted: see :func:`run_jobs`.
    """
    if job.output.exists() and not redo:
        return JobOutcome(job.line, str(job.output), "skipped")
    begin = time.perf_counter()
    where: dict[str, Any] = {"device": device, "attempts": attempts}
    try:
        result = sync(job)
    except Interrupted:
        raise
    except LsyncError as error:
        where.update(seconds=round(time.perf_counter() - begin, 3), error=str(error))
        return JobOutcome(job.line, str(job.output), "failed", **where)
    return JobOutcome(
        job.line,
        str(job.output),
        "done",
        frames=result.num_frames,
        frames_without_face=result.missing_faces,
        seconds=round(result.seconds, 3),
        **where,
    )

"""``lsync sync --jobs LIST.csv``: which processes do a list, what is shown, what is reported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from lsync_compile.bars import one_bar
from lsync_compile.devices import choose_devices
from lsync_compile.errors import MediaError, OptionError
from lsync_compile.files import write_whole
from lsync_compile.jobs.display import spread_bars
from lsync_compile.jobs.listing import JobOutcome, ListedJob, read_jobs, run_jobs
from lsync_compile.jobs.ranks import Meeting, Rank, current_rank, run_claimed
from lsync_compile.jobs.settings import Syncer, SyncSettings
from lsync_compile.jobs.workers import Spread

SOME_FAILED = 1
_STATES = ("done", "skipped", "failed")


def sync_list(
    path: Path,
    settings: SyncSettings,
    *,
    device: str | None,
    devices: str | None,
    redo: bool,
    report: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Sync the clips of a list and say what became of each.

    Args:
        path: of the list, see :func:`read_jobs`.
        settings: how.
        device: one device, and no processes beside this one.
        devices: several, "auto" or None for all GPUs of the machine.
        redo: also clips whose output exists.
        report: file for it all as JSON.
        as_json: print that too.
        quiet: print nothing.

    Raises:
        LsyncError: of what concerns all clips; one clip's errors are in its outcome.
        typer.Exit: with code 1, where a clip failed.
    """
    if device is not None and devices is not None:
        raise OptionError("give --device or --devices, one of the two")
    check_report(report)
    jobs = read_jobs(path)
    console = Console(stderr=True, quiet=quiet or as_json)
    rank = current_rank()
    if rank is not None and devices is not None:
        raise OptionError("--devices: each of several ranks has one device; leave it out")
    if rank is not None:
        found = _in_ranks(jobs, settings, rank, device, redo, console)
        if found is None:
            return
        outcomes, abouts = found
    else:
        names = choose_devices(devices) if device is None else [device]
        do = _in_this_process if len(names) == 1 else _in_workers
        outcomes, abouts = do(jobs, settings, names, redo, console)
    _summarise(outcomes, abouts, report, as_json, quiet)


_Found = tuple[list[JobOutcome], list[dict[str, Any]]]


def _in_this_process(
    jobs: Sequence[ListedJob],
    settings: SyncSettings,
    devices: Sequence[str],
    redo: bool,
    console: Console,
) -> _Found:
    if all(job.output.exists() for job in jobs) and not redo:
        return run_jobs(jobs, _nothing, tell=lambda each: tell_outcome(console, each)), []
    syncer = load(settings, devices[0], console)

    def sync(job: ListedJob) -> Any:
        with one_bar(console, f"Syncing {job.output.name}") as advance:
            return syncer(job, advance)

    outcomes = run_jobs(
        jobs,
        sync,
        redo=redo,
        device=str(syncer.device),
        tell=lambda each: tell_outcome(console, each),
    )
    return outcomes, [syncer.about()]


def _in_workers(
    jobs: Sequence[ListedJob],
    settings: SyncSettings,
    devices: Sequence[str],
    redo: bool,
    console: Console,
) -> _Found:
    with spread_bars(console) as show:
        spread = Spread(
            jobs,
            settings.prepare,
            devices,
            redo=redo,
            tell=lambda each: tell_outcome(console, each),
            show=show,
        )
        outcomes = spread.run()
    abouts = [
        {"device": each.device, "jobs": each.jobs, "deaths": each.deaths, **each.about}
        for each in spread.workers
    ]
    return outcomes, abouts


def _in_ranks(
    jobs: Sequence[ListedJob],
    settings: SyncSettings,
    rank: Rank,
    device: str | None,
    redo: bool,
    console: Console,
) -> _Found | None:
    """What all ranks did, in the first; None in the others."""
    meeting = Meeting(rank)
    own = choose_devices(None)
    syncer = load(settings, device or own[rank.local % len(own)], console)

    def sync(job: ListedJob) -> Any:
        # The bars of several processes would overwrite each other.
        label = f"Syncing {job.output.name}"
        with one_bar(console if rank.first else Console(quiet=True), label) as advance:
            return syncer(job, advance)

    outcomes = run_claimed(
        jobs,
        sync,
        meeting,
        redo=redo,
        device=f"rank {rank.index}, {syncer.device}",
        tell=lambda each: tell_outcome(console, each),
    )
    gathered = meeting.gather(outcomes, {"rank": rank.index, **syncer.about()})
    if gathered is None:
        return None
    return sorted(gathered.outcomes, key=lambda each: each.line), gathered.abouts


def load(settings: SyncSettings, device: str | None, console: Console) -> Syncer:
    """Load the models and say so meanwhile."""
    place = device or "the first GPU, or the CPU"
    with console.status(f"Loading {settings.checkpoint} on {place} …"):
        return settings.load(device)


def tell_outcome(console: Console, outcome: JobOutcome) -> None:
    """Print one line."""
    said = outcome.error or f"{outcome.frames} frames in {outcome.seconds:.1f} s"
    detail = "" if outcome.state == "skipped" else f" ({said})"
    console.print(escape(f"{outcome.output}: {outcome.state}{detail}"))


def _summarise(
    outcomes: list[JobOutcome],
    abouts: list[dict[str, Any]],
    report: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    states: list[str] = [outcome.state for outcome in outcomes]
    summary = {
        "jobs": [asdict(outcome) for outcome in outcomes],
        **{state: states.count(state) for state in _STATES},
        "workers": abouts,
    }
    text = json.dumps(summary, indent=2)
    write_report(report, text)
    if as_json:
        typer.echo(text)
    elif not quiet:
        counts = (f"{states.count(state)} {state}" for state in _STATES)
        typer.echo(f"{len(states)} clips: {', '.join(counts)}")
    if "failed" in states:
        raise typer.Exit(SOME_FAILED)


def check_report(report: Path | None) -> None:
    """Refuse ``--report`` where it cannot be written, before the work.

    Raises:
        MediaError: its folder is missing, or it is one.
    """
    if report is not None and ("\0" in str(report) or not report.parent.is_dir()):
        raise MediaError(f"--report {report}: the folder {report.parent} does not exist")
    if report is not None and report.is_dir():
        raise MediaError(f"--report {report}: is a folder")


def write_report(report: Path | None, text: str) -> None:
    """Write ``--report``, where it was given.

    Raises:
        MediaError: it cannot be written.
    """
    if report is not None:
        write_whole(report, f"{text}\n")


def _nothing(job: ListedJob) -> None:
    raise AssertionError(f"{job.output} exists")

"""What a search found: for the file, and for the one who waited for it."""

from __future__ import annotations

import math
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lsync_compile.tune.search import Measured, Trial, front
from lsync_compile.tune.tuning import Tuned


def to_dict(tuned: Tuned, min_psnr: float) -> dict[str, Any]:
    """What is written beside the options, as plain values for JSON."""
    verdicts = verdicts_of(tuned, min_psnr)
    return {
        "name": tuned.chosen.name,
        "measured": tuned.chosen.measured.to_dict(),
        "confirmed": None if tuned.confirmed is None else tuned.confirmed.to_dict(),
        "complete": tuned.complete,
        "unoptimised_fps": round(tuned.unoptimised.fps, 3),
        "tried": [
            {**trial.to_dict(), "verdict": verdict}
            for trial, verdict in zip(tuned.trials, verdicts, strict=True)
        ],
    }


def verdicts_of(tuned: Tuned, min_psnr: float) -> list[str]:
    """A few words for each trial."""
    best = {id(trial) for trial in front(tuned.trials)}

    def verdict(trial: Trial) -> str:
        if trial is tuned.chosen:
            return "chosen"
        if trial.measured.psnr < min_psnr:
            return "below the floor"
        if trial.name in tuned.refused:
            return f"{decibels(tuned.refused[trial.name])} on other frames"
        return "best at its speed" if id(trial) in best else ""

    return [verdict(trial) for trial in tuned.trials]


def print_answer(
    tuned: Tuned, console: Console, *, min_psnr: float, tolerance: float, frames: tuple[int, int]
) -> None:
    """The table of what was tried, and in words what was chosen and why.

    Args:
        tuned: what was found.
        console: where.
        min_psnr: the floor in dB.
        tolerance: the share of the speed that was given away for quality.
        frames: how many were chosen by, and how many were held out.
    """
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("", "frames/s", "PSNR", "SSIM", "flicker", ""):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    table.add_row("unoptimised", f"{tuned.unoptimised.fps:.2f}", style="dim")
    for trial, verdict in zip(tuned.trials, verdicts_of(tuned, min_psnr), strict=True):
        found = trial.measured
        table.add_row(
            trial.name, f"{found.fps:.2f}", decibels(found), f"{found.ssim:.4f}",
            f"{found.flicker:.2f}", verdict,
            style={"chosen": "bold", "best at its speed": None}.get(verdict, "dim"),
        )  # fmt: skip
    console.print(table)
    for line in sentences(tuned, min_psnr=min_psnr, tolerance=tolerance, frames=frames):
        console.print(line, highlight=False, markup=False)


def sentences(
    tuned: Tuned, *, min_psnr: float, tolerance: float, frames: tuple[int, int]
) -> list[str]:
    """What was chosen and why; arguments as for :func:`print_answer`."""
    chosen, found = tuned.chosen, tuned.chosen.measured
    lines = [
        f"{chosen.name}: {found.fps:.2f} frames/s where the unoptimised run makes "
        f"{tuned.unoptimised.fps:.2f}, mouth {decibels(found)} from it on {frames[0]} frames "
        f"(the floor is {min_psnr:g} dB)"
    ]
    if found.psnr < min_psnr:
        lines.append("nothing is above the floor; this is the most careful way")
    allowed = [each for each in tuned.trials if each.measured.psnr >= min_psnr]
    fastest = max(allowed or [chosen], key=lambda trial: trial.measured.fps)
    if fastest is not chosen and fastest.name not in tuned.refused:
        lines.append(
            f"{fastest.name} made {fastest.measured.fps:.2f} frames/s at "
            f"{decibels(fastest.measured)}; so close (--tolerance {tolerance:g}, or as sure as was "
            "measured), the better picture counts"
        )
    if tuned.confirmed is not None:
        held = "" if tuned.confirmed.psnr >= min_psnr else ": below the floor"
        lines.append(
            f"on {frames[1]} frames that it was not chosen by: {decibels(tuned.confirmed)}{held}"
        )
    elif tuned.complete:
        lines.append("not confirmed: no frames were held out")
    else:
        lines.append("the search is not over; the same call goes on")
    return lines


def decibels(measured: Measured) -> str:
    """Its PSNR in words."""
    return f"{measured.psnr:.1f} dB" if math.isfinite(measured.psnr) else "equal"

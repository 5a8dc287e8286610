"""Finds the fastest options whose mouths stay near the unoptimised ones, on a clip and a machine.

Options are grouped by what they save. The groups are walked in the order of what they usually give
for what they cost to try: those that compile nothing first. Within a group candidates go from
careful to bold, and the first that falls below the floor ends it. The choice of a group is the base
of the next. That is no search of all combinations: it measures a dozen and not thousands.

A few percent of speed are worth less than decibels, and less than their measurement is sure: of
what is about as fast as the fastest, the best in quality is chosen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

BASE = {"preset": "exact"}
TOLERANCE = 0.03  # of the speed: what is given away for better quality
MOST_ERROR = 0.1  # of the speed: surer than this a measurement has to be to count

Options = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Options that save the same thing.

    Attributes:
        name: for the table.
        candidates: name and options of each, from careful to bold.
    """

    name: str
    candidates: Sequence[tuple[str, Options]]


@dataclass(frozen=True)
class Measured:
    """What a run of some options was.

    Attributes:
        psnr: of the mouth against the unoptimised run, dB; infinite for equal pictures.
        ssim: of the same.
        flicker: of the same, 8-bit levels.
        fps: frames/s of a typical chunk, everything but the video encoder included.
        fps_error: standard error of that, as a share of it; 0 where it is not known.
    """

    psnr: float
    ssim: float
    flicker: float
    fps: float
    fps_error: float = 0.0

    def to_dict(self) -> dict[str, float | None]:
        """Plain values for JSON, None for the PSNR of equal pictures."""
        return {**asdict(self), "psnr": self.psnr if math.isfinite(self.psnr) else None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Measured:
        """What :meth:`to_dict` gave."""
        return cls(**{**values, "psnr": math.inf if values["psnr"] is None else values["psnr"]})


# Runs options, given a name for them.
Measure = Callable[[str, Options], Measured]


@dataclass(frozen=True)
class Trial:
    """One run of the walk.

    Attributes:
        group: of the candidate; empty for the base.
        name: of the candidate.
        options: all that were in force.
        measured: what came of it.
    """

    group: str
    name: str
    options: Options
    measured: Measured

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "measured": self.measured.to_dict()}


def groups(steps: int = 20) -> list[Group]:
    """What is tried, for chunks of so many steps."""
    counts = [count for count in (10, 7, 5, 4, 3, 2) if count < steps]
    deep = {"deep_cache": True, "deep_cache_predictor": "linear", "deep_cache_head": 2}
    return [
        Group("steps", [(f"{count} steps, spread", {"few_steps": count}) for count in counts]),
        Group(
            "path of the chunk before",
            [
                (
                    f"path, {count} steps",
                    {
                        "few_steps": 0,
                        "temporal_start": "path",
                        "temporal_strength": count / steps,
                    },
                )
                for count in counts
            ],
        ),
        Group("guidance", [("both halves in one step", {"guided_steps": 1})]),
        Group("decoder", [("crop decode", {"crop_decode": True})]),
        Group("encoder", [("crop encode", {"crop_encode": True})]),
        Group(
            "attention",
            [
                ("lip attention, cells of 2", {"lip_attention": True, "lip_pool": "2"}),
                ("lip attention, cells of 4", {"lip_attention": True, "lip_pool": "4"}),
            ],
        ),
        Group(
            "deep features",
            [
                (f"deep cache {interval}/0, linear", {**deep, "deep_cache_interval": interval})
                for interval in (2, 3, 5)
            ],
        ),
        Group("number format of products", [("8-bit products", {"fp8_linear": True})]),
    ]


class Budget:
    """Time for trials.

    Args:
        seconds: all of it; None has no limit.
        clock: seconds.

    Attributes:
        ran_out: whether something was not begun for want of time.
    """

    def __init__(
        self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds
        self._longest = 0.0
        self.ran_out = False

    def allows(self) -> bool:
        """Whether another trial would end in time, by the longest one so far."""
        if self._end is not None and self._clock() + self._longest > self._end:
            self.ran_out = True
        return not self.ran_out

    def timed(self, measure: Measure) -> Measure:
        """The same function, its calls counted as trials."""

        def run(name: str, options: Options) -> Measured:
            begin = self._clock()
            found = measure(name, options)
            self._longest = max(self._longest, self._clock() - begin)
            return found

        return run


def walk(
    measure: Measure,
    *,
    min_psnr: float,
    tolerance: float = TOLERANCE,
    budget: Budget | None = None,
    tried: Sequence[Group] | None = None,
) -> Iterator[Trial]:
    """Try the groups' candidates one after the other; each trial comes as it is done.

    Args:
        measure: runs options, given a name for them.
        min_psnr: the floor in dB.
        tolerance: see :func:`choose`.
        budget: of time; the first trial is made in any case.
        tried: the groups; all of :func:`groups` for None.
    """
    budget = budget or Budget()
    run = budget.timed(measure)
    base = Trial("", "exact", dict(BASE), run("exact", dict(BASE)))
    yield base
    for group in groups() if tried is None else tried:
        rivals = [base]
        for name, changes in group.candidates:
            if not budget.allows():
                return
            options = {**base.options, **changes}
            trial = Trial(group.name, name, options, run(name, options))
            yield trial
            if trial.measured.psnr < min_psnr:
                break
            rivals.append(trial)
        base = choose(rivals, min_psnr=min_psnr, tolerance=tolerance)


def choose(trials: Sequence[Trial], *, min_psnr: float, tolerance: float = TOLERANCE) -> Trial:
    """The best in quality of those that are as good as the fastest above the floor.

    Args:
        trials: the first of them is taken where none is above the floor.
        min_psnr: the floor in dB.
        tolerance: so much slower than the fastest, as a share, counts as as fast; where the two
            were measured less surely than that, their uncertainty does.
    """
    good = [trial for trial in trials if trial.measured.psnr >= min_psnr]
    if not good:
        return trials[0]
    fastest = max(good, key=lambda trial: trial.measured.fps).measured

    def as_fast(trial: Trial) -> bool:
        unsure = math.hypot(trial.measured.fps_error, fastest.fps_error)
        slack = max(tolerance, min(unsure, MOST_ERROR))
        return trial.measured.fps >= fastest.fps * (1 - slack)

    return max(filter(as_fast, good), key=lambda trial: (trial.measured.psnr, trial.measured.fps))


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Those than which no other is both faster and better, the fastest first."""
    kept: list[Trial] = []
    for trial in sorted(trials, key=lambda each: (-each.measured.fps, -each.measured.psnr)):
        if not kept or trial.measured.psnr > kept[-1].measured.psnr:
            kept.append(trial)
    return kept


def in_order(
    trials: Sequence[Trial], *, min_psnr: float, tolerance: float = TOLERANCE
) -> list[Trial]:
    """The choice, and then what to take instead where it turns out too bad: ever better ones."""
    first = choose(trials, min_psnr=min_psnr, tolerance=tolerance)
    better = [each for each in front(trials) if each.measured.psnr > first.measured.psnr]
    return [first, *better]

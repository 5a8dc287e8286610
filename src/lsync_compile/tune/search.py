"""Finds the fastest options whose mouths stay near the unoptimised ones, on a clip and a machine.

Options are grouped by what they save. The groups are walked in the order of what they usually give
for what they cost to try: those that compile nothing first. Within a group candidates go from
careful to bold, and the first that falls below the floor ends it. What is best so far is the base
of the next group. That is no search of all combinations: it measures a dozen and not thousands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

BASE = {"preset": "exact"}
WORTH = 1.01  # a candidate must be faster than the best by this factor

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
    """

    psnr: float
    ssim: float
    flicker: float
    fps: float


@dataclass(frozen=True)
class Trial:
    """One run of the walk.

    Attributes:
        group: of the candidate; empty for the base.
        name: of the candidate.
        options: all that were in force.
        measured: what came of it.
        verdict: ``kept``, ``below the floor`` or ``no faster``.
    """

    group: str
    name: str
    options: Options
    measured: Measured
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, None for the PSNR of equal pictures."""
        values = asdict(self)
        if self.measured.psnr == float("inf"):
            values["measured"]["psnr"] = None
        return values


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
        Group("decoder", [("crop decode", {"crop_decode": True})]),
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


def walk(
    measure: Callable[[str, Options], Measured],
    *,
    min_psnr: float,
    minutes: float | None = None,
    tried: Sequence[Group] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Trial]:
    """Try the groups' candidates one after the other; each trial comes as it is done.

    Args:
        measure: runs options, given a name for them.
        min_psnr: the floor in dB.
        minutes: start no trial that would end later, by the longest one so far.
        tried: the groups; all of :func:`groups` for None.
        clock: seconds.
    """
    began, longest = clock(), 0.0

    def run(name: str, options: Options) -> Measured:
        nonlocal longest
        begin = clock()
        found = measure(name, options)
        longest = max(longest, clock() - begin)
        return found

    def late() -> bool:
        return minutes is not None and clock() - began + longest > 60 * minutes

    best = run("exact", dict(BASE))
    yield Trial("", "exact", dict(BASE), best, "kept")
    base: Options = dict(BASE)
    for group in groups() if tried is None else tried:
        found = base
        for name, changes in group.candidates:
            if late():
                return
            options = {**base, **changes}
            measured = run(name, options)
            if measured.psnr < min_psnr:
                yield Trial(group.name, name, options, measured, "below the floor")
                break
            faster = measured.fps > best.fps * WORTH
            yield Trial(group.name, name, options, measured, "kept" if faster else "no faster")
            if faster:
                best, found = measured, options
        base = found


def best_of(trials: Sequence[Trial]) -> Trial:
    """The last that was kept: each that is kept is faster than those before."""
    return [trial for trial in trials if trial.verdict == "kept"][-1]

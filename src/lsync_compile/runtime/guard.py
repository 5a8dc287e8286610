"""Watches in production what approximate options do to a run's own pictures, and takes them back.

One chunk in N is also computed exactly: the plain networks, all steps of the call, from the same
noise and conditions. The PSNR of the mouth between the two is the drift. Where it is below the
floor, the chunks after that one are computed a level more carefully: ``turbo`` falls back to
``balanced``, everything else to ``exact``. A run never climbs back: what went wrong once in a clip
may go wrong again between two checks. The next run begins with its own options.

The decision falls before the next chunk is denoised, whatever overlaps, so a run's result depends
on its inputs alone. What it costs is the exact chunk: on top of the others, 1/N of a plain run.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lsync_compile.options import PRESETS, Options
from lsync_compile.report import Session

log = logging.getLogger(__name__)

# Equal pictures have no finite PSNR; 8-bit ones that differ at all are below this.
EQUAL_DB = 100.0


@dataclass(frozen=True)
class GuardLevel:
    """One way to compute a run's chunks.

    Attributes:
        name: for the report.
        options: in force.
    """

    name: str
    options: Options


def guard_levels(options: Options) -> list[GuardLevel]:
    """The ways to compute a run, the given one first, each more careful than the one before."""
    ways = [GuardLevel(options.preset, options)]
    if options.preset == "turbo":
        ways.append(GuardLevel("balanced", _with_preset(options, "balanced")))
    ways.append(GuardLevel("exact", _with_preset(options, "exact")))
    distinct = [ways[0]]
    for level in ways[1:]:
        if level.options != distinct[-1].options:
            distinct.append(level)
    return distinct


def approximate() -> frozenset[str]:
    """Names of the options that change more than rounding, and of what a preset sets."""
    marked = {spec.name for spec in fields(Options) if "Approximate" in spec.metadata["help"]}
    return frozenset(marked.union(*PRESETS.values()))


def _with_preset(options: Options, preset: str) -> Options:
    """The options with everything approximate as a preset has it."""
    defaults = Options()
    changes = {name: getattr(defaults, name) for name in approximate()}
    return replace(options, **{**changes, **PRESETS[preset], "preset": options.preset})


class QualityGuard:
    """Decides at which level each chunk of a run is computed. Made anew for each run.

    Args:
        session: of the compiled pipeline; its options say how often to look and what is too far.
    """

    def __init__(self, session: Session) -> None:
        options = session.options
        self._session = session
        self._every = options.guard_every
        self._floor = options.guard_floor
        self.levels = guard_levels(options)
        self._since = [0]  # first chunk of each level reached so far
        if self._every:
            session.count("guard", checked=0, fallbacks=0)
            if len(self.levels) == 1:
                session.note("guard_every does nothing: no approximate option is on")

    def level(self, chunk: int) -> int:
        """Place in :attr:`levels` of a chunk that was checked or comes after one that was."""
        return max(place for place, first in enumerate(self._since) if first <= chunk)

    def due(self, chunk: int) -> bool:
        """Whether a chunk is to be computed exactly too.

        The second of every N: the first of a run takes all steps under some options, whatever the
        others do.
        """
        if not self._every or self.level(chunk) == len(self.levels) - 1:
            return False
        return chunk % self._every == min(1, self._every - 1)

    def judge(self, chunk: int, ours: Tensor, exact: Tensor, mask: Tensor) -> float:
        """Compare a chunk with what it should be, and fall back where it is too far.

        Args:
            chunk: its number.
            ours, exact: (f, 3, R, R) in [-1, 1].
            mask: (1, R, R), 1 where the picture is kept.

        Returns:
            PSNR of the mouth in dB, at most :data:`EQUAL_DB`.
        """
        drift = mouth_psnr(ours, exact, mask)
        self._session.count("guard", checked=1)
        self._session.least("guard", least_db=round(drift, 2))
        if drift < self._floor:
            self._session.count("guard", fallbacks=1)
            name = self.levels[len(self._since)].name
            self._since.append(chunk + 1)
            text = (
                f"quality guard: chunk {chunk} is {drift:.1f} dB from the exact one, guard_floor "
                f"is {self._floor:g}; chunks from {chunk + 1} on are computed as {name!r}"
            )
            self._session.note(text)
            log.warning("%s", text)
        return drift


def mouth_psnr(ours: Tensor, exact: Tensor, mask: Tensor) -> float:
    """PSNR in dB where the mask is 0, of pictures (f, 3, R, R) in [-1, 1]."""
    region = (mask < 0.5).to(ours.device)
    gap = (ours.float().clamp(-1, 1) - exact.float().clamp(-1, 1)) / 2
    total = torch.where(region, gap.square(), 0.0).sum()
    error = float(total) / max(1, int(region.sum()) * gap.shape[0] * gap.shape[1])
    if math.isnan(error):
        return 0.0
    return min(EQUAL_DB, -10 * math.log10(error)) if error > 0 else EQUAL_DB

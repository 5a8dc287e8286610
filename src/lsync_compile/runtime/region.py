"""Which part of a picture a run generates: what passes may make use of, and graphs depend on.

A run that wants passes to know sets the region around its calls of the networks. It is part of the
terms under which a graph is compiled, so that another mask means another graph; like the step
context it belongs to one thread or asyncio task, and is gone when the ``with`` block is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from lsync_compile.errors import OptionError
from lsync_compile.kernels.lip_tables import encode_region


@dataclass(frozen=True)
class MouthRegion:
    """The region that is generated, and how coarsely the rest may be looked at.

    Attributes:
        cells: map of the latents, text as in :mod:`lsync_compile.kernels.lip_tables`.
        side: latents a side.
        rows: first row of latents with something generated, and the row after the last.
        pool: side in latents of the cells that attention may pool outside; 1 is none.
    """

    cells: str
    side: int
    rows: tuple[int, int]
    pool: int = 1

    def rows_with(self, halo: int) -> tuple[int, int]:
        """The same rows with so many around them, as far as there are any."""
        first, after = self.rows
        return max(0, first - halo), min(self.side, after + halo)


def region_of(mask: Tensor, side: int) -> Tensor:
    """The latents of which a pixel is generated, in part at least, (side, side) bool.

    Args:
        mask: (1, R, R) or (R, R), 1 where the picture is kept; R a multiple of ``side``.

    Raises:
        OptionError: the sizes do not fit.
    """
    square = mask.reshape(mask.shape[-2:])
    pixels = square.shape[-1]
    if square.shape[0] != pixels or side < 1 or pixels % side:
        raise OptionError(f"a mask of {tuple(square.shape)} pixels has no {side}x{side} latents")
    step = pixels // side
    return (square < 0.99).view(side, step, side, step).any(3).any(1)


def make_region(mask: Tensor, side: int, pool: int = 1) -> MouthRegion | None:
    """The region of a mask; None where nothing is generated.

    Args:
        mask, side: as for :func:`region_of`; copied to the host once.
        pool: see :class:`MouthRegion`.
    """
    inside = region_of(mask.detach().cpu(), side)
    rows = torch.nonzero(inside.any(1)).flatten()
    if not len(rows):
        return None
    return MouthRegion(encode_region(inside), side, (int(rows[0]), int(rows[-1]) + 1), pool)


_current: ContextVar[MouthRegion | None] = ContextVar("lsync_mouth_region", default=None)


def current_region() -> MouthRegion | None:
    """The region of the run under way; None outside, and where no option asks for it."""
    return _current.get()


@contextmanager
def mouth_region(region: MouthRegion | None) -> Iterator[None]:
    """Set :func:`current_region` for the block."""
    token = _current.set(region)
    try:
        yield
    finally:
        _current.reset(token)

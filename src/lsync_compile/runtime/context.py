"""Where a run is: the one object that the runtime and a compiled graph share.

The runtime sets it around each UNet call; a compiled graph's guard reads it on the host, so that
no decision needs a device tensor. It lives in a :class:`contextvars.ContextVar`: threads and
asyncio tasks never see each other's, and it is gone when the ``with`` block is left, so nothing of
one run, chunk or step reaches the next.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, get_args

from lsync_compile.runtime.region import MouthRegion, current_region
from lsync_compile.scoped import scoped

Mode = Literal["recompute", "reuse"]

# What a runtime may say of the inputs of a UNet call, which no graph can know.
VOUCHES: dict[str, str] = {
    "guidance": "the batch is two halves with equal `sample` and `timestep`",
    "null_audio": "the first half's `encoder_hidden_states` are zero",
    "constant_channels": "channels 4 and up of `sample` are the same in all steps of a chunk",
}


@dataclass(frozen=True)
class StepContext:
    """One UNet call in its place.

    Attributes:
        run: identity of the run, any hashable; unequal for two runs.
        chunk: which chunk of the run, from 0.
        step: which denoising step of the chunk, from 0.
        steps: how many steps the chunk takes.
        mode: whether the runtime allows cached features in this step ("reuse") or not.
        timestep: value of the ``timestep`` tensor of the call, where the runtime knows it without
            reading it from the device.
        vouched: keys of :data:`VOUCHES` that hold for this call. A graph that was compiled under
            them gives wrong results where they do not hold.

    Raises:
        ValueError: for a step outside ``0 <= step < steps``, a negative chunk, an unknown mode or
            something vouched for that nobody knows.
    """

    run: Hashable
    chunk: int
    step: int
    steps: int
    mode: Mode = "recompute"
    timestep: float | None = None
    vouched: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not 0 <= self.step < self.steps:
            raise ValueError(f"step {self.step} is outside 0..{self.steps - 1}")
        if self.chunk < 0:
            raise ValueError(f"chunk {self.chunk} is negative")
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode {self.mode!r} is none of {', '.join(get_args(Mode))}")
        unknown = self.vouched.difference(VOUCHES)
        if unknown:
            raise ValueError(f"vouched {min(unknown)!r} is none of {', '.join(VOUCHES)}")

    def same_chunk(self, other: StepContext | None) -> bool:
        """Whether ``other`` is a step of the same chunk of the same run.

        State kept between steps is valid only while this holds.
        """
        return other is not None and (self.run, self.chunk) == (other.run, other.chunk)


@dataclass(frozen=True)
class Terms:
    """What calls have in common that one compiled graph is right for, beside their shapes.

    Attributes:
        vouched: as in :class:`StepContext`.
        chunks: whether the calls say to which run and chunk they belong.
        timesteps: whether they say the value of the timestep.
        region: the part of the picture that the run generates, where it says so.
    """

    vouched: frozenset[str] = frozenset()
    chunks: bool = False
    timesteps: bool = False
    region: MouthRegion | None = None


def current_terms() -> Terms:
    """The terms of the call under way; outside a run nothing is vouched for."""
    context, region = current(), current_region()
    if context is None:
        return Terms(region=region)
    return Terms(
        context.vouched, chunks=True, timesteps=context.timestep is not None, region=region
    )


_current: ContextVar[StepContext | None] = ContextVar("lsync_step_context", default=None)


def current() -> StepContext | None:
    """The context of the UNet call under way; ``None`` outside a run (then nothing is reused)."""
    return _current.get()


def step_context(
    run: Hashable,
    chunk: int,
    step: int,
    steps: int,
    mode: Mode = "recompute",
    *,
    timestep: float | None = None,
    vouched: frozenset[str] = frozenset(),
) -> AbstractContextManager[StepContext | None]:
    """Set :func:`current` for the block; the arguments are those of :class:`StepContext`."""
    return scoped(_current, StepContext(run, chunk, step, steps, mode, timestep, vouched))

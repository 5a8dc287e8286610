"""How many denoising steps a chunk takes, and which.

A chunk whose faces look like what came before needs no full denoising: most of its result is known.
How much it changed is the mean squared difference of its aligned faces to the last face before it,
pixels in [0, 1]; thresholds turn that into a number of steps. A chunk of fewer steps takes every
so-manieth timestep of the base schedule, from its first on, so all its timesteps are those of the
base schedule, and what depends on a timestep alone is computed once for all chunks. What longer
steps lose can be made up for, see :mod:`lsync_compile.runtime.temporal`.

Timesteps reach a network as values of a tensor, so no number of steps compiles anything anew.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lsync_compile.errors import OptionError
from lsync_compile.options import nearest

SOLVERS = {
    "ddim": "DDIMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}


@dataclass(frozen=True)
class AdaptiveTimestepScheduler:
    """Chooses how many steps a chunk takes by how much its faces changed.

    Args:
        base: steps of a chunk about which nothing is known, and of one that changed as usual.
        minimum: steps below the first threshold; ``base`` where that is fewer.
        maximum: steps above the last threshold; ``base`` where that is more.
        thresholds: of the mean squared difference: below the first the minimum, below the second
            three quarters of the base, above the third the maximum, between them the base.

    Raises:
        OptionError: for counts that are no positive whole numbers, a minimum above the maximum, or
            thresholds that are not in ascending order.
    """

    base: int = 20
    minimum: int = 10
    maximum: int = 30
    thresholds: tuple[float, float, float] = (0.01, 0.05, 0.2)

    def __post_init__(self) -> None:
        for name in ("base", "minimum", "maximum"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionError(f"{name} must be a positive whole number, not {value!r}")
        if self.minimum > self.maximum:
            raise OptionError(f"minimum={self.minimum} is more than maximum={self.maximum}")
        if not 0 <= self.thresholds[0] <= self.thresholds[1] <= self.thresholds[2]:
            raise OptionError(f"thresholds={self.thresholds} must be in ascending order")

    def steps(self, change: Change | None) -> int:
        """Steps for a chunk that changed so much; None is a chunk with nothing before it."""
        low, middle, high = self.thresholds
        if change is None:
            return self.base
        if change.mean < low:
            return min(self.minimum, self.base)
        if change.mean < middle:
            # Three quarters of few steps may be fewer than the minimum.
            return min(self.base, max(self.minimum, (3 * self.base + 2) // 4))
        return max(self.maximum, self.base) if change.mean > high else self.base


@dataclass(frozen=True)
class Change:
    """What is new about a chunk's faces; mean squared differences of pixels in [0, 1].

    Attributes:
        mean: of all its faces to the last face before it.
        cut: whether the picture jumps, at its start or inside.
    """

    mean: float
    cut: bool


class Faces(Protocol):
    """A chunk's faces, and when they are there.

    Attributes:
        pixels: (f, 3, R, R) in [-1, 1].
        seen: an event after which they are, on a GPU; None otherwise.
    """

    @property
    def pixels(self) -> Tensor: ...

    @property
    def seen(self) -> Any: ...


class ChangeMeter:
    """Compares the faces of each chunk with the last one before; made anew for each run.

    A cut is looked for between neighbouring frames and not in the mean: aligned faces of two
    different people may differ by no more (0.06) than a head that turns within a chunk (0.02), but
    neighbours of one shot by much less (0.0003 to 0.003).

    Args:
        cut: squared difference of two neighbouring frames above which the scene was cut.
    """

    def __init__(self, cut: float = 0.02) -> None:
        self.cut = cut
        self._chunk: int | None = None
        self._face: Tensor | None = None
        self._stream: Any = None

    def __call__(self, chunk: int, faces: Faces) -> Change | None:
        """Compare, and keep the last face.

        Reads two numbers from the device: from a stream of its own, which waits for the faces
        alone. Behind the encoder, which is given them first, the host would be late with the UNet.

        Args:
            chunk: its number; after a gap (a chunk without faces) nothing is known.
            faces: its own.

        Returns:
            None where no chunk came just before.
        """
        with self._beside(faces):
            return self._compared(chunk, faces.pixels)

    def _beside(self, faces: Faces) -> AbstractContextManager[Any]:
        if faces.seen is None:
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(faces.pixels.device)
        self._stream.wait_event(faces.seen)
        faces.pixels.record_stream(self._stream)
        context: AbstractContextManager[Any] = torch.cuda.stream(self._stream)
        return context

    def _compared(self, chunk: int, pixels: Tensor) -> Change | None:
        before = self._face if self._chunk == chunk - 1 else None
        self._chunk, self._face = chunk, pixels[-1].clone()
        if before is None:
            return None
        rows = torch.cat([before[None], pixels]).float()
        mean = (rows[1:] - rows[0]).square().mean()
        jump = (rows[1:] - rows[:-1]).square().flatten(1).mean(1).max()
        values = (torch.stack([mean, jump]) / 4).tolist()
        return Change(mean=values[0], cut=values[1] > self.cut)


def make_solver(scheduler: Any, name: str, spacing: str | None = None) -> Any:
    """A fresh scheduler of another kind with the same noise schedule.

    DDIM (Song et al. 2020), DPM-Solver++ 2M (Lu et al. 2022) and UniPC (Zhao et al. 2023).

    Args:
        scheduler: any diffusers scheduler.
        name: a key of :data:`SOLVERS`.
        spacing: diffusers' ``timestep_spacing``; None keeps that of ``scheduler``.

    Raises:
        OptionError: for an unknown name.
    """
    import diffusers

    if name not in SOLVERS:
        raise OptionError(
            f"unknown solver {name!r}{nearest(name, SOLVERS)}; solvers are {', '.join(SOLVERS)}"
        )
    # Named, as from_config drops what the first scheduler had by default.
    spacing = spacing or scheduler.config.timestep_spacing
    kind = getattr(diffusers, SOLVERS[name])
    return kind.from_config(scheduler.config, timestep_spacing=spacing)


def spread(steps: int, base: int) -> list[int]:
    """Which steps of a base schedule to run, from 0, for fewer of them: evenly, the first always.

    The first must be among them: pure noise is what latents are at its timestep and at no later
    one. Schedulers that space few steps from the end (``leading``) start where latents should be
    part signal, and are the worse the fewer steps they take.
    """
    return [round(step * base / steps) for step in range(steps)]


@dataclass(frozen=True)
class Level:
    """What latents consist of: ``signal * clean + noise * (noise of variance 1)``."""

    signal: float
    noise: float

    def jump(self, latents: Tensor, predicted: Tensor, to: Level) -> Tensor:
        """Latents at another level by DDIM's deterministic step (Song et al. 2020, eq. 12).

        Args:
            latents: at this level, any shape.
            predicted: the noise in them.
            to: the level to go to, near or far.
        """
        scale = to.signal / self.signal
        return scale * latents + (to.noise - scale * self.noise) * predicted


def levels(scheduler: Any) -> list[Level]:
    """The level before each step of a schedule, and the one after the last.

    By the scheduler's own rule for adding noise, asked on the host with single numbers: some
    schedulers move their tables to where they are asked from, and would round differently
    afterwards.

    Args:
        scheduler: set for the chunk, no step taken yet.
    """
    timesteps = scheduler.timesteps
    one, zero = torch.ones(len(timesteps)), torch.zeros(len(timesteps))
    signal = scheduler.add_noise(one, zero, timesteps).tolist()
    noise = scheduler.add_noise(zero, one, timesteps).tolist()
    found = [Level(s, n) for s, n in zip(signal, noise, strict=True)]
    # DDIM may end at the first training timestep instead of no noise at all.
    kept = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    return [*found, Level(kept**0.5, (1 - kept) ** 0.5)]


def can_jump(scheduler: Any, eta: float) -> bool:
    """Whether a scheduler's steps can be replaced by longer ones that :meth:`Level.jump` takes.

    They must be deterministic, and the network predict noise.
    """
    if type(scheduler).__name__ not in SOLVERS.values() or eta > 0:
        return False
    config = scheduler.config
    kind = getattr(config, "algorithm_type", "dpmsolver++")
    return config.prediction_type == "epsilon" and not str(kind).startswith("sde")

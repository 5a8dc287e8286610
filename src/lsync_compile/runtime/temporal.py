"""What the chunk before tells about the denoising of this one.

All frames of all chunks of a run share one frame of noise z (LatentSync draws it once a run). A
deterministic sampler thus takes similar chunks from the same point along similar paths. Two ways to
make use of that:

``path``: the chunk starts from noise as ever and takes few long steps of the base schedule. A long
step from i to j misses the path that the short ones between take. By how much is known exactly for
a chunk that took them all:

    error[i, j] = mean over frames of (x_j - jump(x_i, predicted noise_i, i to j))

and it is nearly the same in the chunks that follow, so it is added to their long steps. Every step
looks at this chunk's own face and sound; only the error of the solver is carried over.

``renoise``: the chunk starts in the middle of the base schedule and runs the last part of it
(SDEdit, Meng et al. 2021), from an estimate of its clean latents with as much noise as is expected
there:

    x_t = signal_t * estimate + noise_t * z
    estimate = momentum * (last result + clip now - clip then) + (1 - momentum) * clip now

z is the run's noise as it is; a share of fresh noise can be mixed in so that the variance stays. No
step is longer than in the base schedule, but what the mouth does is settled in the steps left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lsync_compile.errors import OptionError
from lsync_compile.runtime.timesteps import Level

METHODS = ("path", "renoise")


@dataclass
class Path:
    """The mean over frames of a chunk's way through all steps of its schedule.

    Attributes:
        levels: before each step and after the last.
        latents: (1, 4, 1, h, w) before each step and, at last, after all.
        predicted: (1, 4, 1, h, w), the noise that each step saw.
    """

    levels: list[Level]
    latents: list[Tensor] = field(default_factory=list)
    predicted: list[Tensor] = field(default_factory=list)

    def record(self, latents: Tensor, predicted: Tensor) -> None:
        """Note a step: latents (1, 4, f, h, w) before it and the noise predicted in them."""
        self.latents.append(latents.float().mean(dim=2, keepdim=True))
        self.predicted.append(predicted.float().mean(dim=2, keepdim=True))

    def error(self, start: int, end: int) -> Tensor:
        """What one step from ``start`` to ``end`` misses: (1, 4, 1, h, w). Zero for a short one."""
        latents, predicted = self.latents[start], self.predicted[start]
        there = self.levels[start].jump(latents, predicted, self.levels[end])
        return self.latents[end] - there


class TemporalCoherenceOptimizer:
    """Keeps of a run's chunks what the next one is denoised with. Made anew for each run.

    Only finished chunks are kept: after an error in the middle of one, or a chunk without faces,
    the next is denoised in full.

    Args:
        method: one of :data:`METHODS`.
        momentum: ``renoise``: weight of the last result in the estimate, the rest is the clip.
        noise: ``renoise``: standard deviation of the fresh part of the noise, 0 to 1; the variance
            of all of it is 1 whatever the share. 0 draws no random numbers.
        refresh: denoise every so-manieth chunk in full; 0 only where nothing is known.

    Raises:
        OptionError: for an unknown method or a number outside its range.
    """

    def __init__(
        self, method: str = "path", *, momentum: float = 0.7, noise: float = 0.01, refresh: int = 0
    ) -> None:
        if method not in METHODS:
            raise OptionError(f"method={method!r} is none of {', '.join(METHODS)}")
        for name, value in (("momentum", momentum), ("noise", noise)):
            if not 0 <= value <= 1:
                raise OptionError(f"{name}={value!r} must be from 0 to 1")
        if refresh < 0:
            raise OptionError(f"refresh={refresh!r} must not be negative")
        self.method = method
        self.momentum = momentum
        self.noise = noise
        self.refresh = refresh
        self.path: Path | None = None
        self._chunk: int | None = None
        self._full = 0  # the last chunk that took all steps
        self._change = torch.empty(0)  # (1, 4, 1, h, w), last result minus clip

    def reset(self) -> None:
        """Forget all; the next chunk is denoised in full."""
        self.path = self._chunk = None

    def knows(self, chunk: int) -> bool:
        """Whether enough is known for fewer steps: the chunk just before was denoised."""
        due = self.refresh > 0 and chunk - self._full >= self.refresh
        return self.path is not None and self._chunk == chunk - 1 and not due

    def start(
        self,
        clip: Tensor,
        noise: Tensor,
        level: Level,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``renoise``: latents to start from in the middle of a schedule.

        Args:
            clip: (1, 4, f, h, w), latents of the clip's faces.
            noise: (1, 4, 1, h, w), the run's.
            level: before the first step to run.
            generator: of the fresh share of the noise.

        Returns:
            (1, 4, f, h, w), dtype of ``noise``.
        """
        estimate = clip + self.momentum * self._change
        started = level.signal * estimate + level.noise * self._mixed(noise, generator)
        return started.to(noise.dtype)

    def keep(self, chunk: int, clip: Tensor, latents: Tensor, path: Path | None) -> None:
        """Take a finished chunk.

        Args:
            chunk: its number.
            clip: (1, 4, f, h, w), latents of the clip's faces.
            latents: (1, 4, f, h, w), the result.
            path: of a chunk that took all steps of the base schedule, else None.
        """
        self._chunk = chunk
        self._change = (latents - clip)[:, :, -1:].clone()
        if path is not None:
            path.latents.append(latents.float().mean(dim=2, keepdim=True))
            self.path, self._full = path, chunk

    def assume(self, chunk: int) -> None:
        """``path``: count a chunk that is under way as done; the next needs no more of it."""
        self._chunk = chunk

    def _mixed(self, noise: Tensor, generator: torch.Generator | None) -> Tensor:
        """The run's noise with a share of fresh one, one frame of it for the whole chunk."""
        if self.noise == 0:
            return noise
        where = noise.device if generator is None else generator.device
        # In float32, as the run's noise is drawn.
        fresh = torch.randn(noise.shape, generator=generator, device=where, dtype=torch.float32)
        return math.sqrt(1 - self.noise**2) * noise + self.noise * fresh.to(noise)

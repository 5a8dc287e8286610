"""How each chunk of a run is denoised: in how many steps, which, by what solver, from where.

Puts together :mod:`.timesteps` and :mod:`.temporal` as a run's options say. Without options, all is
as the pipeline's arguments say: every chunk starts from noise and takes the scheduler's steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lsync_compile.options import Options
from lsync_compile.report import Session
from lsync_compile.runtime.temporal import Path, TemporalCoherenceOptimizer
from lsync_compile.runtime.timesteps import (
    AdaptiveTimestepScheduler,
    Change,
    ChangeMeter,
    Faces,
    Level,
    can_jump,
    levels,
    make_solver,
    spread,
)

Step = Callable[[int, Tensor, Tensor], Tensor]


@dataclass
class Walk:
    """One chunk's way from noise to clean latents.

    Attributes:
        chunk: its number.
        latents: (1, 4, f, h, w), with the noise of the first timestep.
        timesteps: to run, (n,), on the host.
        clip: (1, 4, f, h, w), latents of the clip's faces.
        advance: ``(index of the timestep, predicted noise, latents) -> latents`` after the step.
        path: records the steps; None where nobody will ask.
        guided: first steps that compute both halves of guidance; None is all.
        begin: sets the scheduler as it was before the first step.
    """

    chunk: int
    latents: Tensor
    timesteps: Tensor
    clip: Tensor
    advance: Step
    path: Path | None = None
    guided: int | None = None
    begin: Callable[[], None] = lambda: None

    def restart(self) -> None:
        """Forget the steps taken, for a walk that is begun anew."""
        self.begin()
        if self.path is not None:
            self.path.latents.clear()
            self.path.predicted.clear()

    def step(self, index: int, noise: Tensor, latents: Tensor) -> Tensor:
        """Latents after a step, all (1, 4, f, h, w)."""
        if self.path is not None:
            self.path.record(latents, noise)
        return self.advance(index, noise, latents)


class Pace:
    """The walks of a run's chunks, in their order. Made anew for each run.

    Args:
        steps: of a chunk about which nothing is known.
        options: of the compiled pipeline; None changes nothing.
        session: counts what was done.
        eta: of DDIM; steps of a sampler that draws noise are never replaced by longer ones.
    """

    def __init__(
        self,
        steps: int,
        options: Options | None = None,
        session: Session | None = None,
        *,
        eta: float = 0.0,
    ) -> None:
        self._base = steps
        self._session = session
        self._eta = eta
        self._adaptive: AdaptiveTimestepScheduler | None = None
        self._temporal: TemporalCoherenceOptimizer | None = None
        self._meter: ChangeMeter | None = None
        self._solver: str | None = None
        self._strength = 1.0
        self._guided: int | None = None
        self._few = steps
        if options is None:
            return
        self._solver = None if options.solver == "pipeline" else options.solver
        self._strength = options.temporal_strength
        self._guided = options.guided_steps or None
        self._few = min(options.few_steps or steps, steps)
        if options.adaptive_steps:
            self._adaptive = AdaptiveTimestepScheduler(
                base=steps,
                minimum=min(options.adaptive_min_steps, steps),
                maximum=max(options.adaptive_max_steps, steps),
                thresholds=(options.adaptive_low, options.adaptive_middle, options.adaptive_high),
            )
        if options.temporal_start != "off":
            self._temporal = TemporalCoherenceOptimizer(
                options.temporal_start,
                momentum=options.temporal_momentum,
                noise=options.temporal_noise,
                refresh=options.temporal_refresh,
            )
        if self._adaptive is not None or self._temporal is not None:
            self._meter = ChangeMeter(options.scene_cut)

    def solver(self, scheduler: Any) -> Any:
        """The scheduler of the run: the pipeline's, or another solver of its noise schedule."""
        return scheduler if self._solver is None else make_solver(scheduler, self._solver)

    def begin(
        self,
        chunk: int,
        faces: Faces,
        clip: Tensor,
        noise: Tensor,
        scheduler: Any,
        arguments: dict[str, Any],
    ) -> Walk:
        """Set the scheduler for a chunk and make what it starts from.

        Args:
            chunk: its number in the run.
            faces: the clip's.
            clip: (1, 4, f, h, w), their latents.
            noise: (1, 4, 1, h, w), shared by all frames of the run.
            scheduler: what :meth:`solver` returned.
            arguments: further ones of the scheduler's ``step``.
        """
        change = None if self._meter is None else self._meter(chunk, faces)
        temporal = self._temporal if can_jump(scheduler, self._eta) else None
        if temporal is not None and (change is None or change.cut):
            temporal.reset()
        known = temporal is not None and temporal.knows(chunk)
        steps = self._steps(change, known=known)
        whole = steps >= self._base or not can_jump(scheduler, self._eta)
        # Set anew for each chunk: multi-step solvers keep the last chunk's history otherwise. On
        # the host: schedulers look at timesteps in each step, and to read one from a GPU the host
        # would wait for all that it has given it.
        count = steps if whole else self._base

        def begin() -> None:
            scheduler.set_timesteps(count, device="cpu")

        begin()
        started = noise.expand_as(clip) * scheduler.init_noise_sigma
        walk = Walk(
            chunk,
            started,
            scheduler.timesteps,
            clip,
            _scheduled(scheduler, arguments, 0),
            guided=self._guided,
            begin=begin,
        )
        if whole and temporal is not None and steps == self._base:
            walk.path = Path(levels(scheduler))
            walk.guided = None  # others learn from it
        elif not whole and temporal is not None and temporal.method == "renoise":
            skip = self._base - steps
            level = levels(scheduler)[skip]
            walk.latents = temporal.start(clip, noise, level, arguments.get("generator"))
            walk.timesteps = scheduler.timesteps[skip:]
            walk.advance = _scheduled(scheduler, arguments, skip)
        elif not whole:
            run = spread(steps, self._base)
            walk.timesteps = scheduler.timesteps[run]
            walk.advance = _jumps(levels(scheduler), run, temporal.path if temporal else None)
        self._count(change, walk, known=known)
        return walk

    def finish(self, walk: Walk, latents: Tensor) -> None:
        """Take the clean latents (1, 4, f, h, w) of a chunk that was begun."""
        if self._temporal is not None:
            self._temporal.keep(walk.chunk, walk.clip, latents, walk.path)

    @property
    def learns(self) -> bool:
        """Whether chunks are begun with what the first one tells."""
        return self._temporal is not None

    def needs_result(self, walk: Walk) -> bool:
        """Whether the next chunk cannot be begun before this walk is finished."""
        temporal = self._temporal
        return temporal is not None and (temporal.method == "renoise" or walk.path is not None)

    def assume(self, walk: Walk) -> None:
        """Have the next chunk begun as if this walk were finished."""
        if self._temporal is not None:
            self._temporal.assume(walk.chunk)

    def reset(self) -> None:
        """Forget all chunks, after an error."""
        if self._temporal is not None:
            self._temporal.reset()

    def _steps(self, change: Change | None, *, known: bool) -> int:
        if self._temporal is not None and not known:
            return self._base  # the chunk from which the next ones are to learn
        if self._adaptive is not None:
            return self._adaptive.steps(change)
        return max(1, round(self._strength * self._base)) if known else self._few

    def _count(self, change: Change | None, walk: Walk, *, known: bool) -> None:
        session, steps = self._session, len(walk.timesteps)
        if session is None:
            return
        numbers = {
            "chunks": 1,
            "in_fewer_steps": int(steps < self._base),
            "steps_saved": self._base - steps,
        }
        if self._few < self._base:
            session.count("few_steps", **numbers)
        if self._guided is not None:
            alone = 0 if walk.guided is None else max(0, steps - walk.guided)
            session.count("guided_steps", steps=steps, without_the_half=alone)
        if self._adaptive is not None:
            session.count("adaptive_steps", **numbers, in_more_steps=int(steps > self._base))
        if self._temporal is not None:
            cut = change is not None and change.cut
            session.count("temporal_start", **numbers, known=int(known), scene_cuts=int(cut))


def _scheduled(scheduler: Any, arguments: dict[str, Any], skip: int) -> Step:
    """The scheduler's own steps from the one after ``skip`` on."""
    timesteps = scheduler.timesteps[skip:]

    def step(index: int, noise: Tensor, latents: Tensor) -> Tensor:
        after: Tensor = scheduler.step(noise, timesteps[index], latents, **arguments).prev_sample
        return after

    return step


def _jumps(ladder: list[Level], run: list[int], path: Path | None) -> Step:
    """Steps from each level of ``run`` to the next and from the last to the end.

    Args:
        ladder: the levels of the whole schedule, its end included.
        run: which of them are stopped at.
        path: what such steps miss is added, where it is known.
    """
    stops = [*run, len(ladder) - 1]

    def step(index: int, noise: Tensor, latents: Tensor) -> Tensor:
        start, end = stops[index], stops[index + 1]
        after = ladder[start].jump(latents.float(), noise.float(), ladder[end])
        if path is not None:
            after = after + path.error(start, end)
        return after.to(latents.dtype)

    return step

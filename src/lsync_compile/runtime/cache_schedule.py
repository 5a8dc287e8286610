"""Which denoising steps compute what other steps then reuse.

Decided on the host from numbers of steps alone, so that nothing waits for the device, and for every
cache that crosses steps alike.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from lsync_compile.runtime.context import StepContext


@dataclass(frozen=True)
class CacheSchedule:
    """The steps of a chunk that compute; the others reuse.

    Attributes:
        interval: from the last step of the head on, every so many-th step computes.
        head: so many first steps all compute, at least one.
        tail: so many last steps all compute.
        listed: the steps that compute, in order, 0 first; they take the place of the other three.
    """

    interval: int = 3
    head: int = 1
    tail: int = 0
    listed: tuple[int, ...] | None = None

    def computed(self, steps: int) -> tuple[int, ...]:
        """The steps that compute, of a chunk of so many steps, in order."""
        if self.listed is not None:
            return tuple(step for step in self.listed if step < steps)
        regular = range(self.head - 1, steps, self.interval)
        chosen = {*range(self.head), *regular, *range(max(steps - self.tail, 0), steps)}
        return tuple(sorted(step for step in chosen if step < steps))

    def last_computed(self, step: int, steps: int) -> int:
        """The last step up to ``step`` that computes; ``step`` itself where it does."""
        computed = self.computed(steps)
        return computed[bisect_right(computed, step) - 1]


def may_reuse(context: StepContext | None, schedule: CacheSchedule, kept_from: int | None) -> bool:
    """Whether a call may use what an earlier step of its chunk has left.

    Args:
        context: of the call; without one nothing is ever reused.
        schedule: which steps compute.
        kept_from: the step that left what is kept for this chunk; None where nothing is kept.
    """
    if context is None or context.mode != "reuse" or kept_from is None:
        return False
    # Of a later step: the chunk was begun anew. Older than planned: a step that computes was
    # missed.
    planned = schedule.last_computed(context.step, context.steps)
    return planned <= kept_from < context.step

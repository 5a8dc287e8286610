"""Which steps compute."""

from __future__ import annotations

import pytest

from lsync_compile.runtime.cache_schedule import CacheSchedule, may_reuse
from lsync_compile.runtime.context import StepContext


@pytest.mark.parametrize(
    ("schedule", "computed"),
    [
        (CacheSchedule(), (0, 3, 6, 9)),  # the DeepCache package's
        (CacheSchedule(1), tuple(range(10))),
        (CacheSchedule(4, head=3), (0, 1, 2, 6)),
        (CacheSchedule(4, head=3, tail=2), (0, 1, 2, 6, 8, 9)),
        (CacheSchedule(3, head=30, tail=30), tuple(range(10))),
        (CacheSchedule(listed=(0, 5, 9, 15)), (0, 5, 9)),
    ],
)
def test_the_steps_that_compute(schedule: CacheSchedule, computed: tuple[int, ...]) -> None:
    assert schedule.computed(10) == computed
    for step in range(10):
        expected = max(each for each in computed if each <= step)
        assert schedule.last_computed(step, 10) == expected


def context(step: int, mode: str = "reuse") -> StepContext:
    return StepContext("run", 0, step, 10, mode)


def test_only_a_step_of_the_chunk_that_the_runtime_allows_may_reuse() -> None:
    schedule = CacheSchedule(3)
    assert may_reuse(context(4), schedule, 3)
    assert not may_reuse(None, schedule, 3)
    assert not may_reuse(context(4, "recompute"), schedule, 3)
    assert not may_reuse(context(4), schedule, None)
    assert not may_reuse(context(6), schedule, 3)  # computes by the schedule
    assert not may_reuse(context(7), schedule, 3)  # so should have step 6
    assert not may_reuse(context(4), schedule, 4)  # begun anew
    assert not may_reuse(context(4), schedule, 6)
    assert may_reuse(context(5), schedule, 4)  # computed out of turn

"""Where a call is in somebody else's loop: by the schedule's memory, by value, or not at all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lsync_compile.options import Options
from lsync_compile.report import Session
from lsync_compile.runtime.context import StepContext, current, step_context
from lsync_compile.runtime.step_tracker import StepTracker, placed, tracking

SAMPLE = torch.randn(1, 4, 2, 2)
TIMES = [981, 961, 961, 741]  # as PNDM has them, one twice


class Loop:
    """A scheduler and the tracker that follows calls with its timesteps."""

    def __init__(self, values: list[float] = TIMES, **more: Any) -> None:
        self.scheduler = SimpleNamespace(timesteps=torch.tensor(values))
        self.session = Session("loop", Options())
        self.tracker = StepTracker(lambda: self.scheduler, self.session, **more)

    def call(self, timestep: Any, sample: Tensor = SAMPLE, sound: Any = None) -> StepContext | None:
        with tracking(self.tracker), placed("unet", (sample, timestep, sound), {}):
            return current()

    def notes(self) -> str:
        return str(self.session.report().notes)


def where(context: StepContext | None) -> tuple[int, int, int, float | None, str]:
    assert context is not None
    return context.chunk, context.step, context.steps, context.timestep, context.mode


def test_steps_and_chunks_by_the_schedules_memory() -> None:
    loop = Loop()
    found = [where(loop.call(t)) for _ in range(2) for t in loop.scheduler.timesteps]
    assert found == [(c, s, 4, float(TIMES[s]), "reuse") for c in range(2) for s in range(4)]


@pytest.mark.parametrize(
    "form",
    [lambda t: t[None], lambda t: t.expand(6), lambda t: t.item(), lambda t: t.clone()],
    ids=["one", "expanded", "number", "copy on the host"],
)
def test_the_forms_that_a_timestep_may_have(form: Any) -> None:
    loop = Loop()
    found = [where(loop.call(form(t)))[:2] for _ in range(2) for t in loop.scheduler.timesteps]
    assert found == [(c, s) for c in range(2) for s in range(4)]


def test_a_schedule_begun_in_the_middle() -> None:
    loop = Loop([9, 7, 5, 3, 1])
    found = [where(loop.call(t))[:3] for _ in range(2) for t in loop.scheduler.timesteps[2:]]
    assert found == [(c, s, 3) for c in range(2) for s in range(3)]


def test_chunks_of_one_step_and_a_loop_left_early() -> None:
    loop = Loop([5])
    assert [where(loop.call(t))[0] for _ in range(3) for t in loop.scheduler.timesteps] == [0, 1, 2]
    loop = Loop()
    times = list(loop.scheduler.timesteps)
    assert [where(loop.call(t))[:2] for t in (times[0], times[1], times[0])] == [
        *((0, 0), (0, 1), (1, 0))
    ]


def test_another_schedule_and_one_written_over_begin_a_chunk() -> None:
    loop = Loop()
    loop.call(loop.scheduler.timesteps[0])
    loop.scheduler.timesteps = torch.tensor([99.5, 1.5])
    assert where(loop.call(loop.scheduler.timesteps[1]))[:4] == (1, 0, 1, 1.5)
    loop.scheduler.timesteps.copy_(torch.tensor([50.0, 25.0]))
    assert where(loop.call(loop.scheduler.timesteps[0]))[:4] == (2, 0, 2, 50.0)


def test_several_calls_in_a_step_reuse_nothing() -> None:
    """Windows of frames, or guidance's halves one by one."""
    loop = Loop()
    modes = [where(loop.call(t))[-1] for t in loop.scheduler.timesteps for _ in range(2)]
    assert modes == ["reuse"] + ["recompute"] * 7
    assert "called more than once in a step" in loop.notes()


@pytest.mark.parametrize("timestep", [17, torch.tensor(17), torch.tensor([981, 961]), None, "981"])
def test_a_timestep_of_no_schedule_has_no_place(timestep: Any) -> None:
    loop = Loop()
    assert loop.call(timestep) is None
    assert "none of the scheduler's" in loop.notes()


def test_without_a_schedule_and_outside_a_run_nothing_is_said() -> None:
    loop = Loop()
    loop.scheduler = SimpleNamespace()
    assert loop.call(981) is None
    with placed("unet", (SAMPLE, 981), {}):
        assert current() is None


def test_a_loop_that_says_where_it_is_has_the_word() -> None:
    loop = Loop()
    with step_context("run", 3, 1, 2):
        context = loop.call(loop.scheduler.timesteps[0])
    assert context == StepContext("run", 3, 1, 2)


def test_what_is_vouched_for_is_looked_at_once_a_chunk() -> None:
    asked = []

    def vouch(sample: Tensor, sound: Tensor | None) -> frozenset[str]:
        asked.append(len(sample))
        return frozenset({"guidance", "null_audio", "constant_channels"})

    loop = Loop(vouch=vouch)
    equal, sound = torch.cat([SAMPLE, SAMPLE]), torch.ones(4, 5)
    sound[:2] = 0
    contexts = [loop.call(t, equal, sound) for t in loop.scheduler.timesteps]
    assert all(context is not None and len(context.vouched) == 3 for context in contexts)
    assert asked == [2]
    first = loop.scheduler.timesteps[0]
    unequal = loop.call(first, torch.cat([SAMPLE, -SAMPLE]), sound)
    assert unequal is not None
    assert unequal.vouched == {"null_audio", "constant_channels"}
    assert "guidance was expected of its inputs and does not hold" in loop.notes()
    loud = loop.call(loop.scheduler.timesteps[1], equal[:, :3], sound + 1)
    assert loud is not None  # other shapes, looked at again
    assert loud.vouched == {"guidance", "constant_channels"}


def test_runs_are_never_the_same() -> None:
    first, second = (Loop().call(981) for _ in range(2))
    assert first is not None
    assert not first.same_chunk(second)

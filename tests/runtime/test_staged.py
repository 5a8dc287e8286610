"""A staged call: what is kept, for how long, and that nothing stale is ever used."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from lsync_compile.runtime.context import step_context
from lsync_compile.runtime.staged import StagedCall, StageFunction, Watch


class Spy:
    """The function of a stage; counts what the call says of it."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.ran = self.computed = self.reused = 0
        self.error: Exception | None = None

    def __call__(self, *args: Tensor) -> tuple[Tensor, ...]:
        self.ran += 1
        if self.error is not None:
            raise self.error
        return (self.function(*args),)

    def count(self, *, computed: bool) -> None:
        if computed:
            self.computed += 1
        else:
            self.reused += 1


class Machine:
    """``sample + 2 * weight + (2 * weight) * timestep + 2 * weight * sound`` in four graphs."""

    def __init__(self, table_bytes: int = 1000) -> None:
        self.weights = Spy(lambda weight: 2 * weight)
        self.timestep = Spy(lambda timestep, doubled: timestep * doubled)
        self.chunk = Spy(lambda sound, doubled: sound * doubled)
        layout = torch.empty(2)

        def stage(spy: Spy, inputs: tuple[int, ...]) -> StageFunction:
            return StageFunction(spy, inputs, (layout,), spy.count)

        # Arguments: sample, timestep, sound, weight; then the stages' results.
        self.call = StagedCall(
            lambda sample, *parts: sample + sum(parts),
            (0, 4, 5, 6),
            weights=stage(self.weights, (3,)),
            timestep=stage(self.timestep, (1, 4)),
            chunk=stage(self.chunk, (2, 4)),
            watched_weights=(3,),
            watched_chunk=(2,),
            table_bytes=table_bytes,
        )
        self.sample, self.sound, self.weight = torch.rand(2), torch.rand(2), torch.rand(2)

    def __call__(self, timestep: float = 5.0) -> None:
        """Run once and check the result."""
        time = torch.tensor(timestep)
        result = self.call(self.sample, time, self.sound, self.weight)
        double = 2 * self.weight
        expected = self.sample + sum((double, time * double, self.sound * double))
        assert torch.equal(result, expected)

    def ran(self) -> tuple[int, int, int]:
        return self.weights.ran, self.timestep.ran, self.chunk.ran


def run(machine: Machine, run: object, chunks: int = 2, steps: int = 3) -> None:
    for chunk in range(chunks):
        machine.sound = torch.rand(2)
        for step in range(steps):
            with step_context(run, chunk, step, steps, timestep=float(step)):
                machine.sample = torch.rand(2)
                machine(float(step))


def test_each_stage_runs_as_often_as_its_values_are_new() -> None:
    machine = Machine()
    run(machine, "a", chunks=2, steps=3)
    assert machine.ran() == (1, 3, 2)  # once, once a timestep, once a chunk
    assert (machine.weights.computed, machine.weights.reused) == (1, 5)
    assert (machine.timestep.computed, machine.timestep.reused) == (3, 3)
    assert (machine.chunk.computed, machine.chunk.reused) == (2, 4)


def test_a_new_run_starts_anew_even_with_the_same_numbers() -> None:
    machine = Machine()
    run(machine, "a")
    run(machine, "b", chunks=1)
    assert machine.ran() == (2, 6, 3)


def test_without_a_context_only_the_weights_are_kept() -> None:
    machine = Machine()
    machine()
    machine()
    assert machine.ran() == (1, 2, 2)


def test_an_unknown_timestep_is_not_kept() -> None:
    machine = Machine()
    for step in range(3):
        with step_context("a", 0, step, 3):
            machine()
    assert machine.ran() == (1, 3, 1)


def test_a_weight_that_changed_makes_all_anew() -> None:
    machine = Machine()
    with step_context("a", 0, 0, 9, timestep=5.0):
        machine()
        machine.weight.add_(1)  # in place
        machine()
        machine.weight = torch.rand(2)  # another tensor
        machine()
        machine.weight.data = torch.rand(2)  # the same tensor with other memory
        machine()
        machine()
    assert machine.ran() == (4, 4, 4)


def test_writes_that_autograd_does_not_see_count_from_the_next_run_on() -> None:
    machine = Machine()
    with step_context("a", 0, 0, 9, timestep=5.0):
        machine()
    machine.weight.data.add_(1)
    with step_context("b", 0, 0, 9, timestep=5.0):
        machine()


def test_results_of_the_same_weights_stay_where_they_are() -> None:
    machine = Machine()
    with step_context("a", chunk=0, step=0, steps=2):
        machine()
    (result,) = machine.call._kept.weights
    address = result.data_ptr()
    machine.weight.data.mul_(3)  # unseen until the next run
    with step_context("b", chunk=0, step=0, steps=2):
        machine()
    (again,) = machine.call._kept.weights
    assert again is result
    assert again.data_ptr() == address
    machine.weight = torch.rand(2)
    machine()
    assert machine.call._kept.weights[0] is not result


@pytest.mark.parametrize("inference", [False, True])
def test_other_sound_in_the_same_chunk_is_noticed(inference: bool) -> None:
    machine = Machine()
    with step_context("a", 0, 0, 9, timestep=5.0), torch.inference_mode(inference):
        machine.sound = torch.rand(2)
        machine()
        machine.sound = torch.rand(2)
        machine()
        machine()
    assert machine.chunk.ran == 2


def test_sound_written_in_place_is_noticed() -> None:
    machine = Machine()
    with step_context("a", 0, 0, 9, timestep=5.0):
        machine()
        machine.sound.mul_(2)
        machine()
    assert machine.chunk.ran == 2


@pytest.mark.parametrize("stage", ["weights", "timestep", "chunk"])
def test_an_error_leaves_nothing_behind(stage: str) -> None:
    machine = Machine()
    run(machine, "a", chunks=1)
    spy = getattr(machine, stage)
    spy.error = RuntimeError("out of memory")
    machine.sound, machine.weight = torch.rand(2), torch.rand(2)
    for _ in range(2):
        with step_context("a", 0, 0, 3, timestep=0.0), pytest.raises(RuntimeError, match="memory"):
            machine(0.0)
    spy.error = None
    with step_context("a", 0, 0, 3, timestep=0.0):
        machine(0.0)


def test_the_chunk_is_dropped_after_its_last_step() -> None:
    machine = Machine()
    run(machine, "a", chunks=1, steps=2)
    kept = machine.call._kept
    assert kept is not None
    assert not kept.chunks
    with step_context("a", 0, 1, 2, timestep=1.0):  # a second call in the last step
        machine(1.0)
    assert machine.chunk.ran == 2


def test_the_table_of_timesteps_is_bounded() -> None:
    machine = Machine(table_bytes=3 * 8)  # three results of two floats
    for step, timestep in enumerate([1.0, 2.0, 3.0, 1.0, 4.0, 1.0, 2.0]):
        with step_context("a", 0, step, 9, timestep=timestep):
            machine(timestep)
    # 4 drops 2, which is the longest unused; 1 is still there.
    assert machine.timestep.ran == 5


def test_runs_under_way_at_the_same_time_do_not_disturb_each_other() -> None:
    machine = Machine()
    sounds = {name: torch.rand(2) for name in "ab"}
    for step in range(3):
        for name in "ab":
            with step_context(name, 0, step, 3, timestep=float(step)):
                machine.sound = sounds[name]
                machine(float(step))
    assert machine.chunk.ran <= 3  # a's first is dropped with the weights that b's run renews


def test_threads_get_their_own_results() -> None:
    machine = Machine()
    barrier = threading.Barrier(2)

    def work(name: str) -> None:
        sound = torch.rand(2)
        barrier.wait(timeout=10)
        for chunk in range(20):
            for step in range(3):
                with step_context(name, chunk, step, 3, timestep=float(step)):
                    time = torch.tensor(float(step))
                    result = machine.call(machine.sample, time, sound, machine.weight)
                double = 2 * machine.weight
                expected = machine.sample + sum((double, time * double, sound * double))
                assert torch.equal(result, expected)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(work, name) for name in "ab"]:
            future.result()


def test_results_have_the_strides_that_were_planned() -> None:
    seen: list[Tensor] = []

    def main(result: Tensor) -> Tensor:
        seen.append(result)
        return result

    made = torch.rand(3, 2).t()
    spy = Spy(lambda: made)
    stage = StageFunction(spy, (), (torch.empty(2, 3),), spy.count)
    call = StagedCall(
        main,
        (0,),
        weights=stage,
        timestep=None,
        chunk=None,
        watched_weights=(),
        watched_chunk=(),
        table_bytes=1,
    )
    assert torch.equal(call(), made)
    assert seen[0].stride() == (3, 1)


def test_a_watch_does_not_take_a_new_tensor_for_a_dead_one() -> None:
    tensor = torch.rand(2)
    watch = Watch([tensor])
    assert watch.holds([tensor])
    assert not watch.holds([tensor.clone()])
    del tensor
    assert not watch.holds([torch.rand(2)])  # perhaps at the same address

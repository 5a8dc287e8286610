"""The step context: set for a block, gone after it, never another thread's."""

from __future__ import annotations

import threading

import pytest

from lsync_compile.runtime.context import StepContext, current, step_context


def test_outside_a_run_there_is_none() -> None:
    assert current() is None


def test_it_holds_for_the_block_and_nests() -> None:
    with step_context(run="a", chunk=2, step=3, steps=20) as outer:
        assert current() is outer
        assert (outer.run, outer.chunk, outer.step, outer.steps) == ("a", 2, 3, 20)
        assert outer.mode == "recompute"
        with step_context(run="a", chunk=2, step=4, steps=20, mode="reuse") as inner:
            assert current() is inner
        assert current() is outer
    assert current() is None


def test_an_error_leaves_nothing_behind() -> None:
    with pytest.raises(RuntimeError), step_context(run=1, chunk=0, step=0, steps=1):
        raise RuntimeError
    assert current() is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"chunk": 0, "step": 20, "steps": 20},
        {"chunk": 0, "step": -1, "steps": 20},
        {"chunk": -1, "step": 0, "steps": 20},
        {"chunk": 0, "step": 0, "steps": 1, "mode": "resue"},
        {"chunk": 0, "step": 0, "steps": 1, "vouched": frozenset({"gudance"})},
    ],
)
def test_impossible_places_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"step|chunk|mode|vouched"):
        StepContext(run=0, **arguments)


def test_what_the_runtime_knows_goes_along() -> None:
    with step_context("a", 0, 0, 1, timestep=951.0, vouched=frozenset({"guidance"})) as context:
        assert (context.timestep, context.vouched) == (951.0, {"guidance"})
    with step_context("a", 0, 0, 1) as context:
        assert (context.timestep, context.vouched) == (None, frozenset())


def test_state_is_valid_in_one_chunk_of_one_run() -> None:
    here = StepContext("a", 1, 5, 20)
    assert here.same_chunk(StepContext("a", 1, 6, 20))
    assert not here.same_chunk(StepContext("a", 2, 5, 20))
    assert not here.same_chunk(StepContext("b", 1, 5, 20))
    assert not here.same_chunk(None)


def test_threads_do_not_see_each_other() -> None:
    entered, checked = threading.Barrier(2), threading.Barrier(2)
    seen: dict[str, StepContext | None] = {}

    def work(name: str) -> None:
        with step_context(run=name, chunk=0, step=0, steps=1):
            entered.wait(timeout=10)
            seen[name] = current()
            checked.wait(timeout=10)

    with step_context(run="main", chunk=0, step=0, steps=1):
        threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {name: context.run for name, context in seen.items() if context} == {"a": "a", "b": "b"}

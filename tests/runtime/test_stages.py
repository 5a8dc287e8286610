"""Stages side by side: order, errors, bounds, and what they show of themselves."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lsync_compile.errors import OptionError
from lsync_compile.runtime import waits
from lsync_compile.runtime.stages import (
    PipelineParallelProcessor,
    Stage,
    _GivenUpError,
    _Turns,
    tensors_of,
)
from lsync_compile.runtime.timeline import Timeline

CPU = torch.device("cpu")


def lsync_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lsync-")]


def nap(seconds: float) -> Stage:
    def work(item: list[int]) -> list[int]:
        time.sleep(seconds)
        return item

    return Stage("nap", work)


@pytest.mark.parametrize("parallel", [False, True])
def test_items_pass_all_stages_in_order(parallel: bool) -> None:
    drawn = torch.Generator().manual_seed(0)
    stages = [
        Stage("double", lambda item: 2 * item, on_device=True),
        Stage("draw", lambda item: item + torch.rand(1, generator=drawn), on_device=True),
        Stage("text", lambda item: f"{item.item():.4f}"),
    ]
    results = list(PipelineParallelProcessor(range(9), stages, CPU, parallel=parallel))
    expected = torch.Generator().manual_seed(0)
    assert results == [
        f"{(2 * number + torch.rand(1, generator=expected)).item():.4f}" for number in range(9)
    ]
    assert lsync_threads() == []


def test_stages_share_the_stream_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two networks at a time can stop a GPU."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    stages = [
        Stage("faces", abs, True),
        Stage("encode", abs, True, "networks"),
        Stage("text", str),
        Stage("decode", abs, True, "networks"),
        Stage("paste", abs, True),
    ]
    device = torch.device("cuda")
    streams = PipelineParallelProcessor([], stages, device, parallel=True)._streams()
    assert streams[1] is streams[3]
    assert streams[2] is None
    assert len({id(streams[place]) for place in (0, 1, 4)}) == 3


def test_stages_overlap() -> None:
    stages = [nap(0.05)] * 3
    begin = time.perf_counter()
    list(PipelineParallelProcessor(range(6), stages, CPU, parallel=True))
    assert time.perf_counter() - begin < 0.7 * 6 * 3 * 0.05  # 8 of 18 naps in a row, plus slack


def test_the_number_of_items_is_bounded_however_slow_the_caller_is() -> None:
    alive, most = 0, 0

    def source() -> Iterator[int]:
        nonlocal alive, most
        for number in range(20):
            alive += 1
            most = max(most, alive)
            yield number

    processor = PipelineParallelProcessor(
        source(), [Stage("a", abs), Stage("b", abs)], CPU, parallel=True, in_flight=3
    )
    for number, _ in enumerate(processor):
        if number < 3:
            time.sleep(0.05)
        alive -= 1
    assert number == 19
    # The caller is done with its item a moment before the processor knows.
    assert most <= 3


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("where", ["source", "first", "last"])
def test_an_error_comes_after_the_items_before_it(where: str, parallel: bool) -> None:
    def failing(name: str) -> Stage:
        def work(item: int) -> int:
            if where == name and item == 3:
                raise ValueError("chunk 3 is bad")
            return item

        return Stage(name, work)

    def source() -> Iterator[int]:
        for number in range(8):
            if where == "source" and number == 3:
                raise ValueError("chunk 3 is bad")
            yield number

    got: list[int] = []
    stages = [failing("first"), nap(0.001), failing("last")]
    with pytest.raises(ValueError, match="chunk 3"):
        got.extend(PipelineParallelProcessor(source(), stages, CPU, parallel=parallel))
    assert got == [0, 1, 2]
    assert lsync_threads() == []


def test_leaving_early_ends_threads_and_closes_the_source() -> None:
    closed = threading.Event()

    def source() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed.set()

    running = iter(PipelineParallelProcessor(source(), [nap(0.01)] * 2, CPU, parallel=True))
    assert next(running) == 0
    running.close()  # type: ignore[attr-defined]
    assert closed.is_set()
    assert lsync_threads() == []


def test_stages_see_the_callers_context() -> None:
    variable: ContextVar[str] = ContextVar("variable", default="unset")
    variable.set("set")
    stages = [Stage("look", lambda item: variable.get())]
    assert list(PipelineParallelProcessor(range(2), stages, CPU, parallel=True)) == ["set"] * 2


def test_new_shapes_pass_device_stages_alone() -> None:
    running: set[str] = set()
    met: list[tuple[int, frozenset[str]]] = []
    lock = threading.Lock()

    def stage(name: str) -> Stage:
        def work(item: int) -> int:
            with lock:
                running.add(name)
            time.sleep(0.01)
            with lock:
                met.append((item, frozenset(running - {name})))
                running.discard(name)
            return item

        return Stage(name, work, on_device=True)

    processor = PipelineParallelProcessor(
        range(12),
        [stage("encode"), stage("denoise"), stage("decode")],
        CPU,
        parallel=True,
        shape=lambda item: item == 11,
    )
    list(processor)
    assert all(not others for item, others in met if item in (0, 11))
    assert any(others for item, others in met)


@dataclass
class Passing:
    faces: torch.Tensor
    rest: dict[str, list[torch.Tensor]]
    name: str = "chunk"


def test_tensors_are_found_wherever_an_item_has_them() -> None:
    item = Passing(torch.zeros(1), {"a": [torch.ones(2), torch.ones(3)]})
    assert [tensor.numel() for tensor in tensors_of((item, None))] == [1, 2, 3]


@pytest.mark.parametrize("parallel", [False, True])
def test_the_timeline_has_all_work(parallel: bool, tmp_path: Path) -> None:
    timeline = Timeline()
    stages = [Stage("encode", abs, on_device=True), nap(0.01)]
    list(PipelineParallelProcessor(range(3), stages, CPU, parallel=parallel, timeline=timeline))
    seconds = timeline.seconds()
    assert {work: len(spans) for work, spans in seconds.items()} == {
        "read": 3,
        "encode": 3,
        "nap": 3,
    }
    assert min(seconds["nap"]) >= 0.01
    timeline.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == 9
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == set(seconds)
    pytest.importorskip("matplotlib")
    timeline.save(tmp_path / "trace.png")
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")


def test_a_trace_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"\.json, \.png or \.svg"):
        Timeline().save(tmp_path / "trace.txt")


class Unreadable:
    """Fails as it is asked for its first item's place."""

    def __iter__(self) -> Iterator[int]:
        raise OSError("gone")


@pytest.mark.parametrize("parallel", [False, True])
def test_a_source_that_cannot_be_iterated_is_an_error_and_no_hang(parallel: bool) -> None:
    with pytest.raises(OSError, match="gone"):
        list(PipelineParallelProcessor(Unreadable(), [nap(0)], CPU, parallel=parallel))
    assert lsync_threads() == []


def test_too_many_threads_are_an_error_and_those_begun_end(monkeypatch: pytest.MonkeyPatch) -> None:
    begin, begun = threading.Thread.start, []

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("lsync-") and len(begun) == 2:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start"):
        list(PipelineParallelProcessor(range(5), [nap(0)] * 3, CPU, parallel=True))
    assert lsync_threads() == []


def test_giving_up_ends_a_stage_that_waits_for_its_turn() -> None:
    """One works alone, another waits for its turn, the caller leaves."""
    entered, leave = threading.Event(), threading.Event()

    def slow(item: int) -> int:
        if item == 1:
            entered.set()
            leave.wait(5)
        return item

    # Item 1 has a shape of its own: the first stage, with item 2, has to wait for the second.
    stages = [Stage("first", abs, on_device=True), Stage("second", slow, on_device=True)]
    running = iter(
        PipelineParallelProcessor(
            range(9), stages, CPU, parallel=True, shape=lambda item: item == 1
        )
    )
    assert next(running) == 0
    assert entered.wait(5)
    threading.Timer(0.3, leave.set).start()
    running.close()  # type: ignore[attr-defined]
    assert lsync_threads() == []


def test_a_turn_that_is_given_up_while_waiting_leaves_the_others_theirs() -> None:
    turns, met = _Turns(), []

    def give_up() -> None:
        raise _GivenUpError

    def nothing() -> None: ...

    with turns.take(alone=False, meanwhile=nothing):
        with pytest.raises(_GivenUpError), turns.take(alone=True, meanwhile=give_up):
            met.append("alone")
        with turns.take(alone=False, meanwhile=give_up):
            met.append("beside")
    with turns.take(alone=True, meanwhile=give_up):
        met.append("alone")
    assert met == ["beside", "alone"]


def test_a_run_that_stands_still_says_who_waits_for_whom(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waits, "LONG", 0.3)

    def stuck(item: int) -> int:
        time.sleep(0.8 if item == 1 else 0)
        return item

    stages = [nap(0), Stage("denoise", stuck, on_device=True), Stage("decode", abs)]
    with caplog.at_level("INFO", "lsync_compile"):
        list(PipelineParallelProcessor(range(8), stages, CPU, parallel=True))
    lines = [record for record in caplog.records if "stands still" in record.message]
    assert 1 <= len(lines) <= 3  # not one for each that waits
    assert lines[0].levelname == "WARNING"
    assert lines[0].message.endswith("parallel_stages='off')")
    said = dict(part.split(" ", 1) for part in lines[0].message.split(": ", 1)[1].split("; "))
    assert said["denoise"].startswith("works on item 1 (")
    assert "stuck (test_stages.py:" in said["denoise"]
    assert said["decode"].startswith("waits for denoise (")
    assert said["nap"].startswith("waits for denoise to take an item (")
    assert said["the"].startswith("caller waits for decode (")


def test_waiting_for_what_is_compiled_is_no_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waits, "LONG", 0.2)
    compiling = Stage("denoise", lambda item: time.sleep(0.5), on_device=True)
    with caplog.at_level("INFO", "lsync_compile"):
        list(PipelineParallelProcessor(range(1), [compiling], CPU, parallel=True))
    (line, *_) = [record for record in caplog.records if "stands still" in record.message]
    assert line.levelname == "INFO"
    assert "alone as its shape is new" in line.message
    assert "off" not in line.message

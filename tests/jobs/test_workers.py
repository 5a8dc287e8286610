"""Jobs spread over processes: who does what, what a death costs, what an interrupt leaves."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import stand_in_work
from stand_in_work import StandIn

from lsync_compile.errors import CheckpointError, Interrupted, LsyncError
from lsync_compile.jobs.listing import ListedJob
from lsync_compile.jobs.worker import use_only
from lsync_compile.jobs.workers import Spread

TWO = ("cpu:0", "cpu:1")


def jobs(folder: Path, *names: str, sound: str = "0") -> list[ListedJob]:
    """One for each clip's name, which says what happens."""
    return [
        ListedJob(line, Path(f"{name}-{line}"), Path(sound), folder / f"{line}.mp4")
        for line, name in enumerate(names, start=2)
    ]


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(".*")]


def test_a_long_clip_holds_up_no_other_and_what_exists_is_skipped(tmp_path: Path) -> None:
    """The long one ends when all others are there, which half of them would not be."""
    listed = jobs(tmp_path, "long", "a", "b", "c", "d", "e", sound="5")
    listed[3].output.write_text("before")
    told = []
    spread = Spread(listed, StandIn, TWO, tell=told.append)
    outcomes = spread.run()
    assert [each.line for each in outcomes] == [2, 3, 4, 5, 6, 7]
    assert [each.state for each in outcomes] == ["done"] * 3 + ["skipped"] + ["done"] * 2
    assert told[0].state == "skipped"
    assert told[-1].line == 2
    texts = [job.output.read_text() for job in listed]
    assert texts[3] == "before"
    assert len(set(texts)) == 3  # two processes and what was there
    assert texts.count(texts[0]) == 1
    assert sorted(state.jobs for state in spread.workers) == [1, 4]
    assert spread.share_done == 1.0
    assert {outcome.device for outcome in outcomes} == {*TWO, ""}
    assert all(state.about["report"] == {"workers": 2} for state in spread.workers)
    assert not hidden(tmp_path)


def test_a_killed_worker_costs_its_clip_one_more_try_elsewhere(tmp_path: Path) -> None:
    listed = jobs(tmp_path, "once", "a", "b", "c")
    spread = Spread(listed, StandIn, TWO)
    outcomes = spread.run()
    assert [each.state for each in outcomes] == ["done"] * 4
    assert [each.attempts for each in outcomes] == [2, 1, 1, 1]
    assert sum(state.deaths for state in spread.workers) == 1
    (lost,) = [state.device for state in spread.workers if state.deaths]
    assert outcomes[0].device != lost
    assert not hidden(tmp_path)


def test_a_clip_that_kills_two_workers_has_failed_and_the_others_are_done(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    listed = jobs(tmp_path, "killed", "wrong", "missing", "a", "b")
    outcomes = Spread(listed, StandIn, TWO).run()
    assert [each.state for each in outcomes] == ["failed"] * 3 + ["done"] * 2
    assert "its worker died 2 times: it was killed (signal 9)" in outcomes[0].error
    assert outcomes[1].error.endswith("2 times: ValueError: something no one foresaw")
    assert (outcomes[2].attempts, outcomes[2].error) == (1, "missing-4: no such file")
    assert "Traceback" in capfd.readouterr().err  # for whoever has to find the reason
    assert not hidden(tmp_path)


def test_an_interrupt_ends_all_and_leaves_nothing_half(tmp_path: Path) -> None:
    listed = jobs(tmp_path, "a", "endless", "endless", "b")

    def press(spread: Spread) -> None:
        if {(state.doing, state.steps[0]) for state in spread.workers} == {
            ("3.mp4", 1),
            ("4.mp4", 1),
        }:
            assert len(hidden(tmp_path)) == 2
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        Spread(listed, StandIn, TWO, show=press).run()
    assert not hidden(tmp_path)
    assert not multiprocessing.active_children()
    assert [path.name for path in tmp_path.iterdir()] == ["2.mp4"]
    rest = jobs(tmp_path, "a", "a", "a", "b")
    outcomes = Spread(rest, StandIn, TWO).run()
    assert [each.state for each in outcomes] == ["skipped", "done", "done", "done"]


def test_models_that_can_not_be_loaded_are_one_error(tmp_path: Path) -> None:
    listed = jobs(tmp_path, "a", "b")
    with pytest.raises(CheckpointError, match="no weights for cpu"):
        Spread(listed, stand_in_work.refuses, TWO).run()
    with pytest.raises(LsyncError, match=r"no worker could load the models: it was killed"):
        Spread(listed, stand_in_work.dies, TWO).run()
    assert not multiprocessing.active_children()


def test_a_device_that_can_not_be_used_leaves_the_work_to_the_others(tmp_path: Path) -> None:
    spread = Spread(jobs(tmp_path, "a", "b", "c"), stand_in_work.dies_on_one, TWO)
    outcomes = spread.run()
    assert {each.device for each in outcomes} == {"cpu:0"}
    assert [each.state for each in outcomes] == ["done"] * 3


@pytest.mark.parametrize(
    ("visible", "device", "left", "name"),
    [
        (None, "cuda:1", "1", "cuda:0"),
        ("2,5", "cuda:1", "5", "cuda:0"),
        ("2,5", "cpu", "2,5", "cpu"),
    ],
)
def test_a_worker_sees_its_own_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, device: str, left: str, name: str
) -> None:
    import os

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert use_only(device) == name
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left

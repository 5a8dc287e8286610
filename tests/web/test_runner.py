"""The jobs behind the page, without a page."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from told import Told

from lsync_compile.errors import Interrupted, MediaError, NoFaceError
from lsync_compile.media.video import probe, read_frames
from lsync_compile.models.pipeline import LatentSyncPipeline
from lsync_compile.progress import Compiling
from lsync_compile.web import runner as module
from lsync_compile.web.runner import Job, Order, Runner

Maker = Callable[..., Path]


@pytest.fixture
def runner(tiny_pipeline: LatentSyncPipeline) -> Iterator[Runner]:
    vars(tiny_pipeline)["lsync"] = Told("what was done")
    made = Runner(lambda preset: tiny_pipeline)
    yield made
    made.close()


def test_the_result_and_the_original_are_of_equal_length(
    runner: Runner, make_clip: Maker, make_speech: Maker, tmp_path: Path
) -> None:
    """A tall clip, looped: the original is small, shown as it is looped, and silent."""
    clip = make_clip(6, size=(160, 1440), black=(2,))
    job = runner.start("me", Order(clip, make_speech(0.36), steps=2), tmp_path)
    outcome = job.future.result(120)
    assert (outcome.frames, outcome.missing, outcome.report) == (9, 1, "what was done")
    assert (outcome.times, outcome.notes) == ({"decode": 1.5, "paste": 0.5}, ["a note"])
    synced, original = probe(outcome.synced), probe(outcome.original)
    assert outcome.synced.name == "clip_synced.mp4"
    assert (synced.width, synced.height, synced.has_audio) == (160, 1440, True)
    assert (original.width, original.height, original.has_audio) == (80, 720, False)
    shown = [frame.mean() for frame in read_frames(outcome.original)]
    given = [frame.mean() for frame in read_frames(clip)]
    np.testing.assert_allclose(shown, [*given, *given[:-4:-1]], atol=3)
    assert runner.moment(job).share == 1.0


def test_one_job_at_a_time_and_who_asks_second_waits(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker, tmp_path: Path
) -> None:
    begun, go = threading.Event(), threading.Event()

    def compiled(preset: str) -> Any:
        begun.set()
        assert go.wait(120)
        raise NoFaceError(preset)

    runner = Runner(compiled)
    clip = make_clip(3)
    first = runner.start("a", Order(clip, None, preset="exact"), tmp_path)
    second = runner.start("b", Order(clip, None, preset="turbo"), tmp_path)
    third = runner.start("c", Order(clip, None), tmp_path)
    assert begun.wait(120)
    assert [runner.moment(job).ahead for job in (first, second, third)] == [0, 1, 2]
    third.cancel()
    go.set()
    errors = [job.future.exception(120) for job in (first, second, third)]
    assert [type(error) for error in errors] == [NoFaceError, NoFaceError, Interrupted]
    assert [str(error) for error in errors[:2]] == ["exact", "turbo"]
    runner.close()


def test_cancelling_ends_a_job_at_its_next_step_and_leaves_no_file(
    runner: Runner, make_clip: Maker, make_speech: Maker, tmp_path: Path
) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    clip, speech = make_clip(6), make_speech(4.0)
    job = runner.start("me", Order(clip, speech, steps=4), folder)
    while not job.moment().share and not job.wait(0.01):
        pass
    runner.cancel("me")
    runner.cancel("nobody")
    assert job.wait(120)
    assert isinstance(job.future.exception(), Interrupted)
    assert 0 < job.moment().share < 1
    assert list(folder.iterdir()) == []
    again = runner.start("me", Order(clip, make_speech(0.1), steps=1), folder)
    assert again.future.result(120).frames == 3


def test_a_new_order_of_the_same_person_takes_the_place_of_the_old(
    runner: Runner, make_clip: Maker, make_speech: Maker, tmp_path: Path
) -> None:
    clip = make_clip(6)
    old = runner.start("me", Order(clip, make_speech(8.0), steps=4), tmp_path)
    new = runner.start("me", Order(clip, make_speech(0.1, name="b.wav"), steps=1), tmp_path)
    assert new.future.result(120).frames == 3
    assert isinstance(old.future.exception(), Interrupted)


def test_what_fails_is_in_the_outcome(runner: Runner, make_clip: Maker, tmp_path: Path) -> None:
    no_clip = runner.start("a", Order(tmp_path / "none.mp4", None), tmp_path)
    assert isinstance(no_clip.future.exception(120), MediaError)
    dark = make_clip(3, black=(0, 1, 2))
    no_face = runner.start("b", Order(dark, None, steps=1), tmp_path)
    assert isinstance(no_face.future.exception(120), NoFaceError)


def test_the_time_left_follows_the_steps_of_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    job = Job(Order(Path("a.mp4"), None), Path())
    assert job.moment() == module.Moment(0, "Preparing", 0.0, None)
    compiling = Compiling("unet", "2x13x16x32x32", 2000, 120.0)
    job.hear(compiling, None)
    assert job.moment().doing == "Compiling unet, 2 min or less"
    job.hear(compiling, 100.0)
    for done in range(1, 41):  # one step a second
        now[0] += 1.0
        job.advance(done, 100)
    assert job.moment() == module.Moment(0, "", 0.4, pytest.approx(60.0))
    now[0] += 10.0
    assert job.moment().left == pytest.approx(50.0)
    for done in range(42, 82, 2):  # twice as fast
        now[0] += 1.0
        job.advance(done, 100)
    assert job.moment().left == pytest.approx(10.0, abs=2.0)
    job.cancel()
    with pytest.raises(Interrupted):
        job.advance(81, 100)

"""Whole runs on clips of other rates and lengths: which picture stands at which time."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from media_films import Film, read_number

from lsync_compile.media.audio import load_audio
from lsync_compile.media.video import probe, read_frames
from lsync_compile.models.pipeline import LatentSyncPipeline

Speech = Callable[..., Path]


def shown(pipeline: LatentSyncPipeline, clip: Path, speech: Path | None) -> list[int]:
    """The number of the clip's picture in each output frame."""
    results = pipeline.synthesize(clip, speech, num_frames=8, num_inference_steps=1)
    frames = [frame for result in results for frame in result.original]
    assert all(frame.shape == frames[0].shape for result in results for frame in result.frames)
    return [read_number(frame) for frame in frames]


@pytest.mark.parametrize("rate", [Fraction(30), Fraction(30_000, 1001), Fraction(60)])
def test_other_rates_are_synced_at_25_and_in_time(
    tiny_pipeline: LatentSyncPipeline, film: Film, make_speech: Speech, rate: Fraction
) -> None:
    times = [number / rate for number in range(40)]
    numbers = shown(tiny_pipeline, film(40, fps=30, times=times), make_speech(0.6))
    assert len(numbers) == 15
    late = [index / 25 - number / rate for index, number in enumerate(numbers)]
    assert max(np.abs(late)) <= float(1 / rate) + 0.02


def test_a_variable_rate_follows_the_time_stamps_into_the_file(
    tiny_pipeline: LatentSyncPipeline, film: Film, make_speech: Speech, tmp_path: Path
) -> None:
    """As phones film: nothing new for a third of a second, then pictures in a burst."""
    times = [Fraction(t, 100) for t in (0, 4, 8, 40, 44, 48, 50, 52)]
    clip, speech, out = film(8, times=times), make_speech(0.52), tmp_path / "out.mp4"
    assert shown(tiny_pipeline, clip, speech) == [0, 1, *[2] * 8, 3, 4, 5]
    tiny_pipeline(clip, speech, out, num_frames=8, num_inference_steps=1)
    assert len(list(read_frames(out))) == 13
    assert probe(out).fps == 25


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.16, [0, 1, 2, 3]),  # shorter than the clip
        (0.1, [0, 1, 2]),  # not a whole number of frames: the last one is begun
        (0.4, [0, 1, 2, 3, 4, 5, 5, 4, 3, 2]),  # longer: back and forth
    ],
)
def test_the_sound_says_how_long(
    tiny_pipeline: LatentSyncPipeline,
    film: Film,
    make_speech: Speech,
    tmp_path: Path,
    seconds: float,
    expected: list[int],
) -> None:
    clip, speech, out = film(6), make_speech(seconds), tmp_path / "out.mp4"
    assert shown(tiny_pipeline, clip, speech) == expected
    result = tiny_pipeline(clip, speech, out, num_frames=8, num_inference_steps=1)
    assert result.num_frames == len(expected)
    # The encoder of the sound fills its last block.
    assert 0 <= len(load_audio(out)) / 16_000 - len(expected) / 25 < 0.07

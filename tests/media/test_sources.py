"""Clips and sounds in memory against the same ones in files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from lsync_compile.errors import MediaError, OptionError
from lsync_compile.media.audio import load_audio
from lsync_compile.media.sources import FrameArray, SoundArray, hear, length, play

Film = Callable[..., Path]


def decoded(path: Path) -> np.ndarray:
    """Every frame of a file as it is stored, (n, H, W, 3) uint8."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("fps", [12, 24, 25, 30, 50])
def test_frames_are_chosen_as_from_a_file(make_clip: Film, fps: int) -> None:
    """In memory the pictures of a file give the same order, forward and backward."""
    path = make_clip(11, fps=fps, sound=False)
    held = FrameArray(decoded(path), fps)
    count = 2 * length(path, 25) + 3
    assert length(held, 25) == length(path, 25)
    filed, kept = list(play(path, count, 25)), list(play(held, count, 25))
    assert [index for index, _ in kept] == [index for index, _ in filed]
    for (_, mine), (_, theirs) in zip(kept, filed, strict=True):
        # the file's reader converts colours more exactly than `to_ndarray` does
        assert np.abs(mine.astype(int) - theirs.astype(int)).mean() < 4


def test_one_frame_of_a_fast_clip_is_still_shown() -> None:
    held = FrameArray(np.zeros((1, 4, 6, 3), np.uint8), 120)
    assert [index for index, _ in play(held, 3, 25)] == [0, 0, 0]


def test_floating_point_frames_become_eight_bits_and_stay_as_they_were() -> None:
    given = torch.rand(3, 5, 7, 4)
    given[0, 0, 0, :3] = torch.tensor([-0.5, 0.5, 1.5])
    before = given.clone()
    held = FrameArray(given, 25)
    frame = held[0]
    assert frame.shape == (5, 7, 3)
    assert frame.dtype == np.uint8
    assert frame[0, 0].tolist() == [0, 128, 255]
    assert held.key() == FrameArray(before, 25).key() != FrameArray(given, 24).key()
    frame[:] = 0
    assert torch.equal(given, before)


@pytest.mark.parametrize(
    ("shape", "fps", "error", "said"),
    [
        ((2, 4, 4), 25, OptionError, r"\(n, height, width, 3\)"),
        ((2, 4, 4, 1), 25, OptionError, r"\(2, 4, 4, 1\)"),
        ((2, 4, 4, 3), 0, OptionError, "fps must be"),
        ((2, 4, 4, 3), float("nan"), OptionError, "fps must be"),
        ((0, 4, 4, 3), 25, MediaError, "no frame"),
    ],
)
def test_what_is_no_clip_is_refused(
    shape: tuple[int, ...], fps: float, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        FrameArray(torch.zeros(shape), fps)
    with pytest.raises(OptionError, match="int64"):
        FrameArray(torch.zeros(2, 4, 4, 3, dtype=torch.int64), 25)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
def test_a_sound_is_heard_as_from_a_file(tmp_path: Path, rate: int) -> None:
    time = np.arange(rate * 2) / rate
    samples = (0.4 * np.sin(2 * np.pi * 300 * time * (1 + time))).astype(np.float32)
    path = tmp_path / "a.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_f32le", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    expected = load_audio(path)
    heard = hear(SoundArray(torch.from_numpy(samples).repeat(3, 1), rate), 16_000)
    assert heard.shape == expected.shape == (32_000,)
    np.testing.assert_allclose(heard, expected, atol=1e-5)


def test_what_is_no_sound_is_refused() -> None:
    with pytest.raises(OptionError, match="samples must be"):
        SoundArray(np.zeros((1, 2, 3), np.float32), 16_000)
    with pytest.raises(OptionError, match="int16"):
        SoundArray(np.zeros(3, np.int16), 16_000)
    with pytest.raises(OptionError, match="sample_rate"):
        SoundArray(np.zeros(3, np.float32), 0)
    with pytest.raises(MediaError, match="empty"):
        SoundArray(np.zeros((2, 0), np.float32), 16_000)
    with pytest.raises(MediaError, match="finite"):
        hear(SoundArray(np.full(9, np.nan, np.float32), 16_000), 16_000)
    with pytest.raises(MediaError, match="no sound of its own"):
        hear(FrameArray(np.zeros((1, 4, 6, 3), np.uint8), 25), 16_000)

"""The bundled sample is what its description says, and a portrait moves as it is told."""

from __future__ import annotations

import wave
from pathlib import Path

import av
import numpy as np
import pytest

from training.portrait import ASTRONAUT, Pose, Puppet, animate_portrait, curtain

SAMPLE = Path(__file__).resolve().parents[2] / "src/lsync_compile/assets/sample"


def test_clip_has_fifty_frames_and_two_seconds_of_sound() -> None:
    with av.open(str(SAMPLE / "talking.mp4")) as file:
        video = file.streams.video[0]
        assert video.average_rate == 25
        frames = [f.to_ndarray(format="rgb24") for f in file.decode(video)]
    assert len(frames) == 50
    assert frames[0].shape == (480, 384, 3)
    with av.open(str(SAMPLE / "talking.mp4")) as file:
        audio = file.streams.audio[0]
        assert audio.rate == 16000
        parts = [f.to_ndarray() for f in file.decode(audio)]
    samples = np.concatenate(parts, axis=1)
    assert samples.shape[1] == pytest.approx(32000, abs=2048)
    assert np.abs(samples).max() > 0.1


def test_speech_is_three_whole_chunks_at_16_khz() -> None:
    with wave.open(str(SAMPLE / "speech.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
        assert file.getnframes() == 3 * 16 * 640
        pcm = np.frombuffer(file.readframes(32000), np.int16)
    assert np.abs(pcm).max() > 3000


def test_sample_is_smaller_than_a_megabyte() -> None:
    assert sum(f.stat().st_size for f in SAMPLE.iterdir()) < 1_000_000


@pytest.fixture(scope="module")
def portrait() -> np.ndarray:
    """A picture in which every place is different, in the size of the real one."""
    y, x = np.mgrid[:512, :512]
    return np.stack([x // 2, y // 2, 128 + 100 * np.sin(x / 3) * np.sin(y / 3)], -1).astype(
        np.uint8
    )


def test_opening_moves_the_lower_face_only(portrait: np.ndarray) -> None:
    puppet = Puppet(portrait, ASTRONAUT, (96, 120))
    shut, wide = (puppet.show(o, 0.0, Pose()).astype(int) for o in (0.0, 1.0))
    changed = np.abs(shut - wide).max(axis=(1, 2))
    nose = int((ASTRONAUT.nose_y - ASTRONAUT.crop[1]) / ASTRONAUT.crop[3] * 120)
    # LatentSync's mask begins just above the tip of the nose.
    assert changed[: nose - 4].max() <= 8
    assert changed[nose + 4 : nose + 14].max() > 40


def test_a_blink_moves_the_eyes_only(portrait: np.ndarray) -> None:
    puppet = Puppet(portrait, ASTRONAUT, (96, 120))
    awake, shut = (puppet.show(0.3, 0.0, Pose(blink=b)).astype(int) for b in (0.0, 1.0))
    changed = np.abs(awake - shut).max(axis=(1, 2))
    eyes = int((102 - ASTRONAUT.crop[1]) / ASTRONAUT.crop[3] * 120)
    assert changed[eyes - 3 : eyes + 3].max() > 15
    assert changed[eyes + 8 :].max() == 0


def test_animation_repeats_for_a_seed(portrait: np.ndarray) -> None:
    tracks = np.linspace(0, 1, 3, dtype=np.float32), np.zeros(3, np.float32)
    first, again, other = (
        np.stack(animate_portrait(portrait, *tracks, size=(48, 60), seed=s)) for s in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_curtain_moves_a_line_and_leaves_the_ends() -> None:
    y = np.arange(10, dtype=np.float32)[:, None]
    lines = [np.full_like(y, v) for v in (2.0, 4.0, 8.0)]
    moved = [lines[0], np.full_like(y, 6.0), lines[2]]
    rows = curtain(y, lines, moved)[:, 0]
    assert rows.tolist() == [0, 1, 2, 2.5, 3, 3.5, 4, 6, 8, 9]

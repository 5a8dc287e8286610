"""Mouth opening, sound level and the correlation between them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lsync_compile.quality.sync import (
    correlations,
    measure_sync,
    mouth_opening,
    sound_energy,
    speech_band,
)

from .faces import syllables, talking_faces, voice

CLIPS = Path(__file__).parents[3] / "shared" / "data" / "clips"


@pytest.mark.parametrize("teeth", [False, True])
@pytest.mark.parametrize("skin", [(0.85, 0.62, 0.52), (0.36, 0.22, 0.17)])
def test_opening_grows_with_the_gap(teeth: bool, skin: tuple[float, float, float]) -> None:
    measured = mouth_opening(talking_faces(np.linspace(0, 1, 9), skin=skin, teeth=teeth))
    assert (np.diff(measured) > 0).all()


def test_opening_depends_on_neither_brightness_nor_size() -> None:
    opening = syllables(20)
    faces = talking_faces(opening)
    measured = mouth_opening(faces)
    np.testing.assert_allclose(
        speech_band(mouth_opening(faces * 0.8), 25), speech_band(measured, 25), atol=0.02
    )
    large = mouth_opening(talking_faces(opening, side=256))
    assert np.corrcoef(measured, large)[0, 1] > 0.995


def test_opening_of_pieces_is_that_of_the_whole() -> None:
    faces = talking_faces(syllables(11))
    np.testing.assert_array_equal(mouth_opening(faces.split(4)), mouth_opening(faces))


def test_opening_refuses_what_is_no_aligned_face() -> None:
    with pytest.raises(ValueError, match="aligned faces"):
        mouth_opening(torch.zeros(1, 3, 128, 64))
    with pytest.raises(ValueError, match="at least 64"):
        mouth_opening(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("sample_rate", [16_000, 44_100])
def test_energy_of_a_tone_is_known(sample_rate: int) -> None:
    time = np.arange(sample_rate) / sample_rate
    inside = sound_energy(np.sin(2 * np.pi * 1500 * time), 25, sample_rate=sample_rate, fps=25)
    assert inside.shape == (25,)
    np.testing.assert_allclose(inside[3:-3], 1 / math.sqrt(2), rtol=0.01)
    outside = sound_energy(np.sin(2 * np.pi * 200 * time), 25, sample_rate=sample_rate, fps=25)
    assert outside[3:-3].max() < 0.01


def test_energy_lies_on_its_frame() -> None:
    """A click in the middle of frame 7 is loudest there."""
    sound = np.zeros(16_000)
    sound[round(7.5 * 640)] = 1.0
    assert sound_energy(sound, 25, sample_rate=16_000, fps=25).argmax() == 7


def test_energy_of_a_sound_that_ends_early_is_zero() -> None:
    tone = np.sin(2 * np.pi * 1500 * np.arange(8000) / 16_000)
    energy = sound_energy(tone, 50, sample_rate=16_000, fps=25)
    assert energy.shape == (50,)
    assert energy[15:].max() < 1e-3 * energy[5]


@pytest.mark.parametrize("late", [-6, 0, 4])
def test_sync_finds_the_offset(late: int) -> None:
    opening = syllables(120)
    mouth = mouth_opening(talking_faces(np.roll(opening, late)))
    energy = sound_energy(voice(opening), 120, sample_rate=16_000, fps=25)
    sync = measure_sync(mouth, energy)
    assert sync.offset == late
    assert sync.best > 0.8
    assert sync.best > sync.chance
    assert (sync.correlation < 0.5) == (late != 0)


def test_unrelated_mouths_rarely_exceed_chance() -> None:
    """About one in twenty by definition; the seeds are fixed."""
    energy = sound_energy(voice(syllables(250)), 250, sample_rate=16_000, fps=25)
    results = [measure_sync(syllables(250, seed=seed), energy) for seed in range(1, 11)]
    assert sum(result.best > result.chance for result in results) <= 2
    related = measure_sync(syllables(250), energy)
    assert related.best > 2 * related.chance


def test_what_cannot_be_measured_says_why() -> None:
    energy = sound_energy(voice(syllables(80)), 80, sample_rate=16_000, fps=25)
    assert measure_sync(np.zeros(80), energy).note == "the mouth does not move"
    assert measure_sync(syllables(80), np.zeros(80)).note == "the sound is constant or silent"
    short = measure_sync(syllables(20), energy[:20])
    assert short.note == "20 frames; needs 50"
    assert short.to_dict()["best"] is None
    with pytest.raises(ValueError, match="20 frames of opening, 80 of sound"):
        measure_sync(syllables(20), energy)


def test_correlations_equal_numpy() -> None:
    generator = np.random.default_rng(3)
    mouth, sound = generator.normal(size=(2, 40))
    values = correlations(mouth, sound, 2)
    assert values[0] == pytest.approx(np.corrcoef(mouth[:-2], sound[2:])[0, 1])
    assert values[2] == pytest.approx(np.corrcoef(mouth, sound)[0, 1])
    assert values[3] == pytest.approx(np.corrcoef(mouth[1:], sound[:-1])[0, 1])


@pytest.mark.slow
@pytest.mark.skipif(not CLIPS.is_dir(), reason="development clips are not at ../shared/data/clips")
def test_real_speech_is_in_sync() -> None:
    from lsync_compile.media.align import FaceAligner, crop_face
    from lsync_compile.media.audio import load_audio
    from lsync_compile.media.faces import create_detector
    from lsync_compile.media.video import read_frames

    video, count = CLIPS / "demo1_video.mp4", 100
    detector, aligner = create_detector("mtcnn"), FaceAligner(256)
    crops = []
    for frame, _ in zip(read_frames(video), range(count), strict=False):
        face = detector.detect(frame)
        assert face is not None
        crops.append(crop_face(frame, aligner.matrix(face.landmarks), 256))
    faces = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255
    energy = sound_energy(load_audio(video), count, sample_rate=16_000, fps=25)
    sync = measure_sync(mouth_opening(faces), energy)
    assert abs(sync.offset) <= 2
    assert sync.best > max(0.35, sync.chance)

"""Mouth tracks follow the sound they are computed from."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from training.speech import (
    LEVEL,
    SAMPLES_PER_FRAME,
    SpeechSampler,
    mouth_tracks,
    normalise,
    resample,
    speak,
)

RATE = 16000


def tone(hertz: float, seconds: float) -> Tensor:
    return torch.sin(2 * torch.pi * hertz * torch.arange(int(seconds * RATE)) / RATE)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def test_opening_follows_the_loudness_of_a_tone() -> None:
    time = torch.arange(4 * RATE) / RATE
    swell = 0.5 - 0.5 * torch.cos(2 * torch.pi * 1.5 * time)
    opening, _ = mouth_tracks((0.3 * swell * tone(700, 4))[None], 100)
    wanted = swell[SAMPLES_PER_FRAME // 2 :: SAMPLES_PER_FRAME][:100]
    assert correlation(opening[0], wanted) > 0.9
    assert opening.max() > 0.7
    assert opening.min() < 0.1


def test_silence_and_rumble_keep_the_mouth_shut() -> None:
    silent, _ = mouth_tracks(torch.zeros(1, RATE), 25)
    assert silent.max() == 0
    rumble, _ = mouth_tracks(torch.cat([tone(60, 1), 0.3 * tone(800, 1)])[None], 50)
    assert rumble[0, :20].max() < 0.1 < rumble[0, 30:45].min()


def test_gain_does_not_move_the_mouth() -> None:
    sound = torch.cat([0.2 * tone(700, 1), 0.05 * tone(300, 1)])[None]
    loud, quiet = mouth_tracks(sound, 50)[0], mouth_tracks(0.25 * sound, 50)[0]
    assert torch.allclose(loud, quiet, atol=0.02)


def test_upper_formants_spread_the_mouth_and_middle_ones_round_it() -> None:
    ee = tone(300, 1) + 0.5 * tone(2400, 1)
    oo = tone(300, 1) + 0.5 * tone(800, 1)
    _, width = mouth_tracks(0.1 * torch.cat([ee, oo])[None], 50)
    assert width[0, 5:20].mean() > 0.3
    assert width[0, 30:45].mean() < -0.3


def test_normalise_sets_the_level_of_the_spoken_parts() -> None:
    sound = torch.cat([0.01 * tone(500, 1), torch.zeros(RATE)])[None]
    assert normalise(sound)[0, :RATE].pow(2).mean().sqrt().item() == pytest.approx(LEVEL, rel=0.02)
    assert normalise(torch.zeros(1, RATE)).abs().max() == 0


def test_sampler_repeats_for_a_seed_and_keeps_sound_and_motion_together() -> None:
    time = torch.arange(20 * RATE) / RATE
    bursts = (torch.sin(2 * torch.pi * 1.1 * time) > 0) * 0.2
    tape = bursts * tone(700, 20)
    first = SpeechSampler([tape], seed=3).batch(6, 40, margin=4)
    again = SpeechSampler([tape], seed=3).batch(6, 40, margin=4)
    other = SpeechSampler([tape], seed=4).batch(6, 40, margin=4)
    assert torch.equal(first.sound, again.sound)
    assert not torch.equal(first.sound, other.sound)
    assert first.sound.shape == (6, 48 * SAMPLES_PER_FRAME)
    assert first.opening.shape == first.width.shape == (6, 40)
    inner = first.sound[:, 4 * SAMPLES_PER_FRAME : -4 * SAMPLES_PER_FRAME]
    power = inner.unflatten(1, (40, SAMPLES_PER_FRAME)).pow(2).mean(-1).sqrt()
    assert correlation(first.opening.flatten(), power.flatten()) > 0.6


def test_sampler_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="no sounds"):
        SpeechSampler([])
    with pytest.raises(ValueError, match="longer than"):
        SpeechSampler([tone(500, 2)]).batch(1, 400)


def test_resample_keeps_pitch_and_level() -> None:
    resampled = resample(0.5 * tone(440, 1), RATE, 22050)
    assert len(resampled) == 22050
    assert torch.fft.rfft(resampled).abs().argmax() == 440
    assert resampled[2000:-2000].abs().max().item() == pytest.approx(0.5, rel=0.02)


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_spoken_words_open_the_mouth_between_silences() -> None:
    sound = speak("Mama saw a car.", voice="en-us", speed=150)
    opening, _ = mouth_tracks(normalise(sound[None]), len(sound) // SAMPLES_PER_FRAME)
    assert opening.max() > 0.7
    assert opening[0, -1] < 0.1

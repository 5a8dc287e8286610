"""The log-mel spectrogram against Whisper's as transformers computes it."""

from __future__ import annotations

import pytest
import torch
from transformers import WhisperFeatureExtractor

from lsync_compile.models.mel import LogMel, mel_filters


@pytest.fixture(scope="module")
def sound() -> torch.Tensor:
    torch.manual_seed(0)
    time = torch.arange(32_000) / 16_000
    sweep = torch.sin(2 * torch.pi * (100 * time + 900 * time**2))
    return 0.3 * sweep + 0.01 * torch.randn(32_000)


@pytest.mark.parametrize("bands", [80, 128])
def test_filters_are_those_of_transformers(bands: int) -> None:
    expected = torch.from_numpy(WhisperFeatureExtractor(feature_size=bands).mel_filters.T).float()
    torch.testing.assert_close(mel_filters(bands), expected, rtol=0, atol=1e-7)


def test_spectrogram_is_that_of_transformers(sound: torch.Tensor) -> None:
    expected = WhisperFeatureExtractor()(
        sound.numpy(), sampling_rate=16_000, padding="longest", return_tensors="pt"
    )["input_features"][0]
    logs = LogMel()(sound)
    scaled = (logs.clamp(min=float(logs.max()) - 8) + 4) / 4
    torch.testing.assert_close(scaled, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 1), (0, 200), (1, 2), (3, 70), (198, 200), (199, 200)]
)
def test_any_piece_is_that_of_the_whole(sound: torch.Tensor, start: int, stop: int) -> None:
    log_mel = LogMel()
    piece = log_mel.frames(sound, start, stop)
    torch.testing.assert_close(piece, log_mel(sound)[:, start:stop], rtol=0, atol=1e-4)


def test_batches_and_the_shortest_sound(sound: torch.Tensor) -> None:
    log_mel = LogMel()
    batch = log_mel(sound.view(2, 4, 4000)[..., :3200])
    assert batch.shape == (2, 4, 80, 20)
    torch.testing.assert_close(batch[1, 2], log_mel(sound.view(2, 4, 4000)[1, 2, :3200]))
    assert log_mel(sound[:320]).shape == (80, 2)


def test_silence_is_the_floor() -> None:
    assert torch.equal(LogMel()(torch.zeros(640)), torch.full((80, 4), -10.0))

"""Whisper's states against its definition, from both formats, and windows that leave no seam."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from whisper_files import encode_by_hand, random_weights, write_openai, write_transformers

from lsync_compile.errors import CheckpointError, OptionError
from lsync_compile.models.audio import AudioEncoder
from lsync_compile.models.mel import LogMel
from lsync_compile.models.whisper import WhisperAudioEncoder, window_starts

WINDOW, OVERLAP = 200, 50  # instead of 1500 and 250


def sound(steps: int) -> torch.Tensor:
    """Noise that swells and fades, with a loud moment near the start."""
    generator = torch.Generator().manual_seed(5)
    time = torch.arange(320 * steps)
    samples = 0.05 * (1.2 + torch.sin(time / 2500)) * torch.randn(len(time), generator=generator)
    samples[3000:4000] *= 5
    return samples


def scaled_mel(samples: torch.Tensor) -> torch.Tensor:
    logs = LogMel()(samples)
    return (logs.clamp(min=float(logs.max()) - 8) + 4) / 4


def load(tmp_path: Path, *, positions: bool = True, overlap: int = OVERLAP) -> WhisperAudioEncoder:
    path = write_openai(tmp_path / "tiny.pt", random_weights(WINDOW, positions=positions))
    return WhisperAudioEncoder.from_pretrained(path, overlap=overlap)


def test_states_of_an_openai_file_are_whispers_without_the_final_norm(tmp_path: Path) -> None:
    weights = random_weights(WINDOW)
    encoder = WhisperAudioEncoder.from_pretrained(write_openai(tmp_path / "tiny.pt", weights))
    assert isinstance(encoder, AudioEncoder)
    assert (encoder.states, encoder.feature_dim) == (5, 16)
    samples = sound(WINDOW)
    expected = encode_by_hand(weights, scaled_mel(samples))
    torch.testing.assert_close(encoder.encode(samples), expected, rtol=0, atol=1e-4)


def test_short_sounds_are_continued_with_zero_mel(tmp_path: Path) -> None:
    weights = random_weights(WINDOW)
    samples = sound(70)
    mel = torch.nn.functional.pad(scaled_mel(samples), (0, 2 * WINDOW - 140))
    features = load(tmp_path).encode(samples)
    assert features.shape == (70, 5, 16)
    torch.testing.assert_close(features, encode_by_hand(weights, mel)[:70], rtol=0, atol=1e-4)


def test_states_of_a_transformers_folder(tmp_path: Path) -> None:
    folder, model = write_transformers(tmp_path / "whisper", WINDOW)
    samples = sound(WINDOW)
    with torch.no_grad():
        output = model.encoder(scaled_mel(samples)[None], output_hidden_states=True)
        features = WhisperAudioEncoder.from_pretrained(folder).encode(samples)
        torch.testing.assert_close(features[:, 0], output.hidden_states[0][0], rtol=0, atol=1e-5)
        torch.testing.assert_close(features[:, 3], output.hidden_states[3][0], rtol=0, atol=1e-5)
        normed = model.encoder.layer_norm(features[:, 4])
    torch.testing.assert_close(normed, output.last_hidden_state[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("steps", "starts"),
    [
        (1, [0]),
        (200, [0]),
        (201, [0, 1]),
        (350, [0, 150]),
        (351, [0, 76, 151]),
        (1000, [0, 133, 267, 400, 533, 667, 800]),
    ],
)
def test_windows_are_full_spread_evenly_and_overlap(steps: int, starts: list[int]) -> None:
    found = window_starts(steps, WINDOW, OVERLAP)
    assert found == starts
    assert found[-1] + WINDOW >= steps
    assert all(b - a <= WINDOW - OVERLAP for a, b in itertools.pairwise(found))


def test_content_is_the_same_wherever_windows_begin(tmp_path: Path) -> None:
    """State 0 less the blended position table is the convolution of the sound as a whole."""
    samples = sound(600)
    bare = random_weights(WINDOW, positions=False)
    x = scaled_mel(samples)[None]
    x = torch.nn.functional.gelu(
        torch.nn.functional.conv1d(x, bare["conv1.weight"], bare["conv1.bias"], padding=1)
    )
    whole = torch.nn.functional.gelu(
        torch.nn.functional.conv1d(x, bare["conv2.weight"], bare["conv2.bias"], stride=2, padding=1)
    )[0].T
    for overlap in (20, 50, 110):
        encoder = load(tmp_path, positions=False, overlap=overlap)
        features = encoder.encode(samples)[:, 0]
        # The outermost step of a window lacks its neighbour and has the least weight.
        assert (features - whole).abs().max() < 0.05
        assert (features - whole).abs().median() < 1e-5


def test_deeper_states_depend_little_on_where_windows_begin(tmp_path: Path) -> None:
    samples = sound(600)
    runs = [load(tmp_path, positions=False, overlap=o).encode(samples) for o in (50, 80, 110)]
    scale = runs[0].std()
    for run in runs[1:]:
        error = (run - runs[0]).square().mean(dim=(1, 2)).sqrt() / scale
        assert error.max() < 0.05
        assert error.mean() < 0.01


def test_no_jump_where_windows_join(tmp_path: Path) -> None:
    """Steps change no faster where windows join than elsewhere; end to end they jump."""
    samples = sound(1000)

    def changes(overlap: int) -> torch.Tensor:  # (T - 1, states), RMS from step to step
        features = load(tmp_path, overlap=overlap).encode(samples)
        return features.diff(dim=0).square().mean(dim=2).sqrt()

    blended, end_to_end = changes(OVERLAP), changes(0)
    typical = end_to_end.median(dim=0).values
    jumps = end_to_end[[start - 1 for start in window_starts(1000, WINDOW, 0)[1:]]]
    assert (jumps.mean(dim=0) > 1.8 * typical).all()
    joins = torch.cat(
        [blended[start : start + OVERLAP] for start in window_starts(1000, WINDOW, OVERLAP)[1:]]
    )
    assert (joins.mean(dim=0) < typical).all()
    assert (joins.amax(dim=0) < 1.5 * typical).all()


def test_any_part_can_be_read_in_any_order(tmp_path: Path) -> None:
    encoder, samples = load(tmp_path), sound(1000)
    whole = encoder.encode(samples)
    features = encoder.open(samples)
    assert len(features) == 1000
    for start, stop in ((990, 1000), (0, 1), (140, 420), (400, 401), (0, 1000)):
        torch.testing.assert_close(features.read(start, stop), whole[start:stop], rtol=0, atol=1e-6)
    with pytest.raises(IndexError):
        features.read(1000, 1001)


def test_each_window_is_encoded_once_when_read_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load(tmp_path)
    encoded = []
    original = encoder.encode_window
    monkeypatch.setattr(
        encoder, "encode_window", lambda mel: encoded.append(mel.shape) or original(mel)
    )
    features = encoder.open(sound(1000))
    for start in range(0, 960, 32):
        features.read(start, start + 40)
    assert encoded == [(80, 2 * WINDOW)] * 7


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tiny\.pt: no such file"):
        WhisperAudioEncoder.from_pretrained(tmp_path / "tiny.pt")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "tiny.pt")
    with pytest.raises(CheckpointError, match=r"tiny\.pt: is not one of OpenAI's"):
        WhisperAudioEncoder.from_pretrained(tmp_path / "tiny.pt")

    weights = random_weights(WINDOW)
    del weights["blocks.2.mlp.0.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing \(first: layers\.2\.fc1\.bias\)"):
        WhisperAudioEncoder.from_pretrained(write_openai(tmp_path / "cut.pt", weights))

    folder, _ = write_transformers(tmp_path / "whisper", WINDOW)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights; looked for model\.safetensors"):
        WhisperAudioEncoder.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        WhisperAudioEncoder.from_pretrained(folder)


def test_overlap_must_fit_the_window(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="overlap: 200 is not within a window of 200"):
        load(tmp_path, overlap=WINDOW)
    path = write_openai(tmp_path / "full.pt", random_weights(1500))
    assert WhisperAudioEncoder.from_pretrained(path).overlap == 250

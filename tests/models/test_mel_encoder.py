"""The small audio encoder: shapes, pieces, training, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lsync_compile.errors import CheckpointError
from lsync_compile.models.mel_encoder import MelAudioEncoder


@pytest.fixture(scope="module")
def encoder() -> MelAudioEncoder:
    torch.manual_seed(0)
    return MelAudioEncoder().eval()


def noise(seconds: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    swell = torch.sin(torch.arange(round(seconds * 16_000)) / 3000)
    return 0.1 * swell * torch.randn(round(seconds * 16_000), generator=generator)


def test_it_looks_like_whisper_tiny_and_is_small(encoder: MelAudioEncoder) -> None:
    assert (encoder.states, encoder.feature_dim) == (5, 384)
    assert sum(p.numel() for p in encoder.parameters()) <= 600_000


@pytest.mark.parametrize(("samples", "steps"), [(1, 1), (320, 1), (321, 2), (16_000, 50)])
def test_fifty_steps_a_second_rounded_up(
    encoder: MelAudioEncoder, samples: int, steps: int
) -> None:
    features = encoder.encode(noise(1)[:samples])
    assert features.shape == (steps, 5, 384)
    assert features.isfinite().all()


def test_features_are_of_unit_scale_and_differ_between_states(encoder: MelAudioEncoder) -> None:
    features = encoder.encode(noise(2))
    assert features.mean().abs() < 0.05
    assert 0.9 < features.std() < 1.1
    for state in range(1, 5):
        difference = (features[:, state] - features[:, state - 1]).square().mean()
        assert difference > 0.5


def test_a_long_sound_in_pieces_is_the_same_as_at_once(encoder: MelAudioEncoder) -> None:
    sound = noise(70)  # 3,500 steps: three pieces
    with torch.no_grad():
        at_once = encoder(encoder.mel(sound)[None])[0]
    torch.testing.assert_close(encoder.encode(sound), at_once, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (40, 41), (7, 90), (97, 100)])
def test_any_part_can_be_read(encoder: MelAudioEncoder, start: int, stop: int) -> None:
    sound = noise(2)
    part = encoder.open(sound).read(start, stop)
    torch.testing.assert_close(part, encoder.encode(sound)[start:stop], rtol=0, atol=1e-4)


def test_reach_is_as_far_as_a_step_sees(encoder: MelAudioEncoder) -> None:
    mel = torch.randn(1, 80, 200, requires_grad=True)
    encoder(mel)[0, 50].square().sum().backward()
    assert mel.grad is not None
    touched = mel.grad.abs().sum(dim=(0, 1)).nonzero().flatten()
    assert 2 * (50 - encoder.reach) <= touched.min()
    assert touched.max() < 2 * (50 + encoder.reach + 1)
    assert touched.min() < 2 * (50 - encoder.reach + 2), "the margin is not far larger than needed"


def test_marks_tell_the_steps_of_a_window_apart(encoder: MelAudioEncoder) -> None:
    marked = encoder.mark(torch.zeros(3, 50, 384)).detach()
    assert torch.equal(marked[0], marked[2])
    steps = marked[0].view(10, 5, 384)
    assert torch.equal(steps[:, 0], steps[:, 4]), "all states of a step bear its mark"
    apart = torch.cdist(steps[:, 0], steps[:, 0]) + 99 * torch.eye(10)
    assert apart.min() > 1


def test_silence_and_faint_noise_are_the_same(encoder: MelAudioEncoder) -> None:
    faint = 1e-6 * torch.randn(16_000)
    torch.testing.assert_close(encoder.encode(torch.zeros(16_000)), encoder.encode(faint))


def test_every_weight_can_be_trained() -> None:
    encoder = MelAudioEncoder()
    features = encoder(encoder.mel(noise(1).view(2, 8000)[:, :7680]))  # (2, 24, 5, 384)
    encoder.mark(features[:, :10].flatten(1, 2)).tanh().sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_save_and_load(encoder: MelAudioEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path, dtype=torch.float32)
    before = torch.get_rng_state()
    again = MelAudioEncoder.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before), "loading draws no random numbers"
    assert torch.equal(again.encode(noise(1)), encoder.encode(noise(1)))

    encoder.save_pretrained(tmp_path)  # fp16
    halved = MelAudioEncoder.from_pretrained(tmp_path)
    assert halved.dtype == torch.float32
    assert (halved.encode(noise(1)) - encoder.encode(noise(1))).abs().max() < 0.02


def test_what_is_wrong_with_the_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"audio\.json"):
        MelAudioEncoder.from_pretrained(tmp_path)
    MelAudioEncoder(width=32).save_pretrained(tmp_path)
    description = json.loads((tmp_path / "audio.json").read_text())
    (tmp_path / "audio.json").write_text(json.dumps(description | {"width": 48}))
    with pytest.raises(CheckpointError, match=r"conv1\.weight is \(32, 80, 3\).*\(48, 80, 3\)"):
        MelAudioEncoder.from_pretrained(tmp_path)
    (tmp_path / "audio.json").write_text(json.dumps(description | {"depth": 3}))
    with pytest.raises(CheckpointError, match="depth"):
        MelAudioEncoder.from_pretrained(tmp_path)
    (tmp_path / "audio.safetensors").unlink()
    (tmp_path / "audio.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=r"audio\.safetensors: no such file"):
        MelAudioEncoder.from_pretrained(tmp_path)

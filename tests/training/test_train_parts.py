"""Losses, calibration, the latent bank, noise, and the sheet: the parts of training."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

from lsync_compile.models.audio import audio_windows
from training.augment import (
    borrow_voice,
    colour_mel,
    jitter_colour,
    jitter_geometry,
    jitter_mel,
    jitter_sound,
)
from training.bank import LatentBank
from training.codec import SCALING_FACTOR, calibrate, decode, encode, new_vae
from training.denoise import (
    draw_noise,
    draw_timesteps,
    region_weights,
    sound_windows,
    unet_input,
)
from training.graphed import GraphedTerms
from training.losses import mouth_map, noise_loss_weight, reconstruction
from training.sheet import contact_sheet
from training.sources import (
    CONTEXT,
    SAMPLES,
    SURROUNDED,
    ClipMaker,
    Clips,
    Recording,
    at_tempo,
    part_of_sound,
    soften,
)
from training.train_unet import chunk_length


def test_reconstruction_is_zero_for_the_target_and_counts_the_mouth_more() -> None:
    torch.manual_seed(0)
    target = torch.rand(1, 3, 64, 64) * 2 - 1
    zero = torch.zeros(1, 4, 8, 8)
    weight = 1 + 2 * mouth_map(64)
    assert float(reconstruction(target, target, zero, zero, weight)["loss"]) < 1e-6
    at_mouth, at_brow = target.clone(), target.clone()
    at_mouth[..., 40:48, 28:36] += 0.3
    at_brow[..., 8:16, 28:36] += 0.3
    losses = [
        float(reconstruction(x, target, zero, zero, weight)["l1"]) for x in (at_mouth, at_brow)
    ]
    assert losses[0] > 2 * losses[1]


def test_noise_weight_is_that_of_clean_latents() -> None:
    alpha_bar = torch.tensor([0.99, 0.8, 0.5, 0.2, 0.01])
    snr = alpha_bar / (1 - alpha_bar)
    weight = noise_loss_weight(alpha_bar, cap=1e9)
    torch.testing.assert_close(weight * snr, snr.clamp(max=5) + 1)
    assert float(noise_loss_weight(alpha_bar, cap=20).max()) == 20


def test_calibration_gives_unit_latents_and_the_same_pictures() -> None:
    torch.manual_seed(0)
    vae = new_vae((8, 8, 8, 8), groups=4).eval()
    batches = [torch.rand(4, 3, 64, 64) * 2 - 1 for _ in range(2)]
    before = [vae.decode(vae.encode(b).latent_dist.mode()).sample for b in batches]
    spread = [vae.encode(b).latent_dist.std for b in batches]
    means = torch.cat([vae.encode(b).latent_dist.mean for b in batches])
    moments = calibrate(vae, batches)
    latents = [vae.encode(b).latent_dist for b in batches]
    scaled = torch.cat([p.mean for p in latents]) * SCALING_FACTOR
    torch.testing.assert_close(scaled.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(scaled.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    after = [vae.decode(p.mode()).sample for p in latents]
    torch.testing.assert_close(torch.cat(after), torch.cat(before), atol=1e-4, rtol=1e-4)
    # The latents' own noise scales along with them.
    gain = 1 / (means.std((0, 2, 3)) * SCALING_FACTOR)
    torch.testing.assert_close(
        latents[0].std, spread[0] * gain[None, :, None, None], rtol=1e-3, atol=1e-5
    )
    assert len(moments["std"]) == 4


def test_encode_and_decode_work_in_pieces() -> None:
    torch.manual_seed(0)
    vae = new_vae((8, 8, 8, 8), groups=4).eval()
    vae.quant_conv.weight.data[4:] = 0
    vae.quant_conv.bias.data[4:] = -60  # no latent noise, so that two calls agree
    pixels = torch.rand(5, 3, 32, 32) * 2 - 1
    latents = encode(vae, pixels, piece=2)
    torch.testing.assert_close(latents, encode(vae, pixels), atol=1e-5, rtol=1e-4)
    assert latents.shape == (5, 4, 4, 4)
    assert decode(vae, latents, piece=2).shape == (5, 3, 32, 32)


class CountingMaker:
    """Clips whose pixels, second take and sound tell the frame number."""

    def __init__(self, *, second: bool) -> None:
        self.device, self.size, self.mask = torch.device("cpu"), 16, torch.ones(1, 16, 16)
        self.second = second

    def clips(self, kind: str, n: int, length: int) -> Clips:
        numbers = torch.arange(length, dtype=torch.float32)[None, :, None, None, None]
        frames = numbers.expand(n, length, 3, 16, 16)
        samples = torch.arange((length + 2 * CONTEXT) * SAMPLES) // SAMPLES - CONTEXT
        other = frames + 1000 if self.second else None
        return Clips(frames, other, samples.float().expand(n, -1))


def passing_vae() -> SimpleNamespace:
    def encode_pixels(pixels: Tensor) -> SimpleNamespace:
        small = pixels[:, :1, ::8, ::8].expand(-1, 4, -1, -1) / SCALING_FACTOR
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda: small))

    return SimpleNamespace(encode=encode_pixels, dtype=torch.float32)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("frames", [16, 3])
def test_bank_keeps_sound_and_picture_together(second: bool, frames: int) -> None:
    torch.manual_seed(0)
    bank = LatentBank(
        CountingMaker(second=second),  # type: ignore[arg-type]
        passing_vae(),
        slots=(4, 0, 6),
        shares=(0.5, 0.2, 0.3),
        length=48,
        piece=2,
    )
    bank.fill()
    assert bank.made == 10
    bank.refresh(2)
    batch = bank.batch(64, frames)
    shown = batch.target[:, 0, :, 0, 0]  # (B, F): frame numbers
    assert torch.equal(shown.diff(dim=1), torch.ones(64, frames - 1))
    assert len(shown[:, 0].unique()) > 5
    heard = batch.sound.view(64, frames + 2 * CONTEXT, SAMPLES)
    assert torch.equal(heard[:, CONTEXT : CONTEXT + frames, 0], shown)
    assert torch.equal(heard[..., 0], heard[..., -1])
    reference = batch.reference[:, 0, :, 0, 0]
    from_second = reference[:, 0] >= 1000
    assert torch.equal(reference[from_second] - 1000, shown[from_second])
    apart = (reference[~from_second][:, :, None] - shown[~from_second][:, None, :]).abs()
    assert float(apart.min()) >= 1  # never a frame of the chunk itself
    assert (from_second.float().mean() > 0.3) == second


def test_a_wave_of_the_training_windows_is_that_of_the_pipeline() -> None:
    torch.manual_seed(0)
    features = torch.randn(200, 5, 8)
    start, frames = 32, 16  # a chunk in the middle of a sound
    wanted = audio_windows(features, start, frames)
    first = 2 * (start - CONTEXT)
    part = features[first : first + 2 * (frames + 2 * CONTEXT)]
    torch.testing.assert_close(sound_windows(part[None], frames)[0], wanted)


def test_noise_of_training_does_not_cancel_between_frames() -> None:
    torch.manual_seed(0)
    noise = draw_noise(torch.empty(64, 4, 16, 8, 8))
    assert float(noise.std()) == pytest.approx(1.0, abs=0.01)
    difference = noise[:, :, 1:] - noise[:, :, :-1]
    assert float(difference.std()) == pytest.approx(1.0, abs=0.01)
    together = (noise[:, :, 0] * noise[:, :, 9]).mean()
    assert float(together) == pytest.approx(0.5, abs=0.02)


def test_timesteps_cover_the_schedule_evenly() -> None:
    torch.manual_seed(0)
    steps = draw_timesteps(10, torch.device("cpu")).sort().values
    assert torch.equal(steps // 100, torch.arange(10))


def test_unet_input_has_the_pipeline_order() -> None:
    parts = [torch.full((1, 4, 2, 3, 3), float(v)) for v in (1, 2, 3)]
    mask = torch.full((1, 3, 3), 9.0)
    joined = unet_input(parts[0], mask, parts[1], parts[2])
    assert joined[0, :, 0, 0, 0].tolist() == [1] * 4 + [9] + [2] * 4 + [3] * 4


def test_region_weights_follow_the_mask() -> None:
    mask = torch.ones(1, 64, 64)
    mask[:, 24:60, 8:56] = 0
    region = region_weights(mask, 8)[0, 0, 0]
    assert float(region[0, 0]) == pytest.approx(0.3, abs=0.05)
    assert float(region[5, 4]) > 2


def test_lengths_of_chunks_vary() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [chunk_length(16, generator) for _ in range(400)]
    assert 0.8 < sum(frames == 16 for frames in drawn) / 400 < 0.95
    # Few lengths, because each is a shape of its own; none longer than a chunk.
    assert set(drawn) == {3, 8, 16}
    assert chunk_length(1, generator) == 1


def test_sound_of_a_part_is_padded_with_silence() -> None:
    sound = torch.arange(1, 20 * SAMPLES + 1).float()
    part = part_of_sound(sound, 2, 16)
    assert len(part) == (16 + 2 * CONTEXT) * SAMPLES
    lead = (CONTEXT - 2) * SAMPLES
    assert not part[:lead].any()
    assert float(part[lead]) == 1.0
    assert float(part[CONTEXT * SAMPLES]) == 2 * SAMPLES + 1
    assert float(part[lead + 20 * SAMPLES - 1]) == 20 * SAMPLES
    assert not part[lead + 20 * SAMPLES :].any()


def test_clips_vary_as_a_whole() -> None:
    torch.manual_seed(0)
    frame = torch.rand(4, 1, 3, 32, 32) * 1.6 - 0.8
    clips = frame.expand(-1, 3, -1, -1, -1).contiguous()
    for vary in (jitter_geometry, jitter_colour):
        varied = vary(clips)
        torch.testing.assert_close(varied[:, 0], varied[:, 2])
        assert not torch.allclose(varied, clips, atol=1e-3)
        assert float(varied.abs().max()) <= 1
    sound = torch.randn(4, 800)
    assert jitter_sound(sound).shape == sound.shape
    assert float(jitter_sound(torch.zeros(4, 800)).abs().max()) < 1e-3  # silence stays silent


def test_spectra_are_stretched_and_have_gaps() -> None:
    torch.manual_seed(0)
    flat = torch.full((8, 80, 40), 0.3)
    torch.testing.assert_close(jitter_mel(flat), flat)
    ramp = torch.linspace(-1, 1, 80)[None, :, None].expand(64, -1, 40).contiguous()
    varied = jitter_mel(ramp)
    assert float(varied.abs().max()) <= 1
    # Band 60 of another voice is band 52.5 to 67.5 of this one, save where it is hidden.
    band = varied[:, 60].median(dim=1).values
    seen = band[(band > float(ramp[0, 52, 0])) & (band < float(ramp[0, 68, 0]))]
    assert len(seen) > 45
    assert float(seen.std()) > 0.05
    # Stripes of time: some columns of a picture differ from the others.
    odd = (varied != varied.median(dim=2, keepdim=True).values).any(1).float().mean()
    assert 0.02 < float(odd) < 0.2


def test_soft_mask_has_an_edge() -> None:
    mask = torch.ones(1, 64, 64)
    mask[:, 32:] = 0
    soft = soften(mask)
    assert soft.shape == mask.shape
    assert 0 < float(soft[0, 32, 10]) < 1
    assert float(soft[0, 10, 10]) == pytest.approx(1)


def test_contact_sheet_holds_all_rows(tmp_path: Path) -> None:
    faces = torch.rand(3, 3, 64, 64) * 2 - 1
    contact_sheet(
        tmp_path / "a" / "sheet.png",
        {"one": faces, "two": faces},
        side=32,
        bars={"loud": torch.tensor([0.0, 0.5, 1.0])},
    )
    width, height = Image.open(tmp_path / "a" / "sheet.png").size
    assert width > 96
    assert height > 64


def test_colour_of_sound_is_a_smooth_gain_and_a_little_noise() -> None:
    torch.manual_seed(0)
    flat = torch.zeros(32, 80, 200)
    varied = colour_mel(flat)
    gain = varied.mean(2)
    assert 0.05 < float(gain.std()) < 0.3
    assert float((gain[:, 1:] - gain[:, :-1]).abs().max()) < 0.06
    assert 0 < float((varied - gain[:, :, None]).std()) < 0.06


def test_a_borrowed_voice_is_as_loud_from_moment_to_moment() -> None:
    torch.manual_seed(0)
    time = torch.arange(32000) / 16000
    level = (0.6 + 0.4 * torch.sin(2 * math.pi * 2 * time))[None]
    voice = torch.sin(2 * math.pi * 300 * time)[None] * torch.exp(-((time * 3) % 1))
    borrowed = borrow_voice(level * 0.1 * torch.randn(1, 32000), voice)
    heard = borrowed.square().unfold(1, 1600, 1600).mean(-1).sqrt()
    wanted = 0.1 * level.unfold(1, 1600, 1600).mean(-1)
    assert float((heard / wanted - 1).abs().max()) < 0.3
    assert not borrow_voice(torch.zeros(1, 32000), voice).any()  # silence stays silent


def test_a_take_at_another_tempo_keeps_sound_and_picture_together() -> None:
    # Frame i is painted i, and its sound is i as well.
    number = torch.arange(100)
    frames = number.to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    take = Recording("t", "real", frames, number.float().repeat_interleave(SAMPLES), 80)
    for tempo in (0.8, 1.0, 1.2):
        seen, sound = at_tempo(take, 20, 32, tempo)
        shown = ((seen[:, 0, 0, 0] + 1) * 127.5).round()
        middle = sound.view(-1, SAMPLES)[CONTEXT : CONTEXT + 32, SAMPLES // 2]
        assert float(shown[0]) == 20
        assert float(shown[-1]) == int(20.5 + 31 * tempo)
        assert float((shown - middle).abs().max()) <= 1
    seen, sound = at_tempo(take, 40, 32, 1.2)
    assert float(((seen + 1) * 127.5).max()) < 80  # never what is held out
    assert not sound[-SAMPLES:].any()


def test_terms_recorded_or_not_leave_gradients() -> None:
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    terms = GraphedTerms(lambda x: {"loss": (weight * x).sum(), "twice": 2 * weight}, [weight])
    for x in (1.0, 3.0):
        values = terms(torch.tensor([x]))
        assert float(weight.grad) == x  # not added to the last call's
        assert float(values["loss"]) == 2 * x
        assert not values["twice"].requires_grad


def test_surroundings_say_something_else_than_the_mouth() -> None:
    torch.manual_seed(0)
    mask = torch.ones(1, 64, 64)
    mask[:, 24:60, 8:56] = 0
    maker = ClipMaker.__new__(ClipMaker)
    maker._soft = soften(mask)
    clips = maker._surround(torch.zeros(200, 2, 3, 64, 64), torch.ones(200, 2, 3, 64, 64))
    around, mouth = clips[:, 0, 0, 2, 2], clips[:, 0, 0, 42, 32]
    assert not mouth.any(), "the mouth is that of the speech"
    assert set(around.tolist()) == {0.0, 1.0}
    assert float(around.mean()) == pytest.approx(SURROUNDED, abs=0.12)

"""The noise objective of LatentSync, and sampling as its pipeline does it.

Inputs of the UNet, in this order of channels: noisy latents (4), mask (1; 1 is kept, 0 is
generated, as in the pipeline), latents of the masked face (4), latents of the reference (4).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor, nn

from lsync_compile.models.audio import WINDOW_STEPS
from lsync_compile.models.mel_encoder import MelAudioEncoder
from training.augment import uniform
from training.bank import Batch
from training.losses import denoising, mouth_map
from training.sources import CONTEXT

FEATURES_PER_FRAME = 2  # 50 Hz features, 25 frames/s
WINDOW = (-4, WINDOW_STEPS - 4)  # the steps that a frame attends to, around twice its number


def signal_levels(scheduler: DDIMScheduler, device: torch.device) -> Tensor:
    """Cumulative signal level of each of the 1000 training timesteps, ``(1000,)`` fp32."""
    levels: Tensor = scheduler.alphas_cumprod.to(device, torch.float32)
    return levels


def draw_timesteps(n: int, device: torch.device) -> Tensor:
    """``(n,)`` timesteps in [0, 1000), spread evenly over the batch."""
    place = (torch.arange(n, device=device) + torch.rand(1, device=device)) / n % 1
    return (place * 1000).long().clamp(max=999)


def draw_noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Noise for ``(B, C, F, h, w)``: half of the variance shared by the frames, half their own.

    This is the mixed noise of LatentSync's training (https://arxiv.org/abs/2305.10474). Sampling
    shares all of it; training must not: shared noise cancels in the difference of two frames, so
    the motion could be read off the noisy latents at any noise level, and nothing would be
    learned from the sound.
    """
    own = torch.randn(like.shape, generator=generator, device=like.device)
    shared = torch.randn(like[:, :, :1].shape, generator=generator, device=like.device)
    mixed: Tensor = (own + shared) * 0.5**0.5
    return mixed


def sound_windows(features: Tensor, frames: int) -> Tensor:
    """Features ``(B, T, S, D)`` that start ``CONTEXT`` frames early -> ``(B, F, 10 S, D)``."""
    centre = FEATURES_PER_FRAME * (CONTEXT + torch.arange(frames, device=features.device))
    index = centre[:, None] + torch.arange(*WINDOW, device=features.device)
    return features[:, index].flatten(2, 3)


def hear(audio: MelAudioEncoder, mel: Tensor, frames: int) -> Tensor:
    """What frames attend to, ``(B, F, 10 S, D)``, of ``mel`` that starts `CONTEXT` frames early."""
    return audio.mark(sound_windows(audio(mel), frames))


def region_weights(mask: Tensor, side: int) -> Tensor:
    """``(1, 1, 1, h, w)``: 0.3 where the picture is kept, 1 where it is made, 3 at the mouth."""
    made = 1 - F.interpolate(mask[None], size=(side, side))
    mouth = mouth_map(side, device=mask.device)
    return (0.3 + 0.7 * made + 2 * mouth)[:, :, None]


def training_terms(
    unet: nn.Module,
    windows: Tensor,
    batch: Batch,
    levels: Tensor,
    mask: Tensor,
    region: Tensor,
    *,
    drop_sound: float,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Loss of one batch.

    windows: ``(B, F, 10 S, D)`` of the batch's sound, see `hear`; mask: ``(1, h, w)`` at latent
    size; region: ``(1, 1, 1, h, w)``; drop_sound: share of the chunks that get null sound (zeros).
    """
    n = len(batch.target)
    timesteps = draw_timesteps(n, batch.target.device)
    noise = draw_noise(batch.target)
    heard = uniform(n, 0, 1, batch.target) >= drop_sound
    windows = windows * heard[:, None, None, None]
    level = levels[timesteps]
    predicted = predict(unet, batch, noise, timesteps, level, windows, mask, dtype)
    return denoising(predicted, noise, level, region)


def predict(
    unet: nn.Module,
    batch: Batch,
    noise: Tensor,
    timesteps: Tensor,
    level: Tensor,
    windows: Tensor,
    mask: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Noise that the UNet sees in the noised target; ``(B, 4, F, h, w)``."""
    scale = level[:, None, None, None, None]
    noisy = scale.sqrt() * batch.target + (1 - scale).sqrt() * noise
    inputs = unet_input(noisy, mask, batch.masked, batch.reference).to(dtype)
    output: Tensor = unet(inputs, timesteps, windows.to(dtype), return_dict=False)[0]
    return output


def unet_input(noisy: Tensor, mask: Tensor, masked: Tensor, reference: Tensor) -> Tensor:
    """Concatenate to ``(B, 13, F, h, w)``; mask ``(1, h, w)``."""
    n, _, frames, height, width = noisy.shape
    plane = mask[None, :, None].expand(n, 1, frames, height, width)
    return torch.cat([noisy, plane.to(noisy.dtype), masked, reference], dim=1)


@torch.no_grad()
def sample(
    unet: nn.Module,
    scheduler: DDIMScheduler,
    masked: Tensor,
    reference: Tensor,
    windows: Tensor,
    mask: Tensor,
    noise: Tensor,
    *,
    steps: int = 20,
    guidance: float = 1.5,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Latents ``(B, 4, F, h, w)`` by DDIM with guidance against null sound, as the pipeline.

    noise: ``(1, 4, 1, h, w)``, shared by all chunks and frames.
    """
    latents = noise.expand_as(masked).clone()
    scheduler.set_timesteps(steps, device=latents.device)
    both = torch.cat([torch.zeros_like(windows), windows]).to(dtype)
    for t in scheduler.timesteps:
        inputs = unet_input(latents, mask, masked, reference).to(dtype)
        output = unet(torch.cat([inputs, inputs]), t, both, return_dict=False)[0].float()
        null, heard = output.chunk(2)
        latents = scheduler.step(null + guidance * (heard - null), t, latents).prev_sample
    return latents


@torch.no_grad()
def probe(
    unet: nn.Module,
    windows: Tensor,
    batch: Batch,
    levels: Tensor,
    mask: Tensor,
    region: Tensor,
    *,
    seed: int,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Held-out error of the implied clean latents with the right, a wrong and no sound.

    The same noise and timesteps each time, so that the three differ by the sound alone; the
    timesteps are those where the mouth is decided (high noise) and refined (middle).
    """
    generator = torch.Generator(batch.target.device).manual_seed(seed)
    noise = draw_noise(batch.target, generator)
    result = {}
    sounds = {"right": windows, "wrong": windows.roll(1, 0), "none": torch.zeros_like(windows)}
    for name, heard in sounds.items():
        errors = []
        for timestep in (850, 600, 350):
            t = torch.full((len(noise),), timestep, device=noise.device)
            level = levels[t]
            out = predict(unet, batch, noise, t, level, heard, mask, dtype).float()
            scale = ((1 - level) / level)[:, None, None, None, None]
            errors.append(((out - noise).square() * scale * region).mean() / region.mean())
        result[name] = float(torch.stack(errors).mean())
    return result

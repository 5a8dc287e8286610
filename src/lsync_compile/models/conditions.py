"""What the networks are given for a chunk, and what a run may say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor


@dataclass(frozen=True)
class Conditions:
    """What a chunk's denoising is conditioned on; h = w = R / 8, batch 2 with guidance."""

    audio: Tensor | None  # (2 f, S, D), the null half first
    fixed: Tensor  # (2, 9, f, h, w): mask, masked-image latents, reference latents

    def heard(self) -> Conditions:
        """The half with the sound alone, of one chunk or several, where there is guidance."""
        audio = None if self.audio is None else self.audio.chunk(2)[1]
        return Conditions(audio, self.fixed.chunk(2)[1])


@dataclass(frozen=True)
class Prepared:
    """A chunk after the VAE's encoder; nothing random has happened to it yet.

    Attributes:
        pixels: (f, 3, R, R) float32 in [-1, 1], the faces.
        moments: parameters of the posteriors of the masked and the reference faces, each
            (f, 8, h, w).
        cropped: whether the masked ones were encoded in part, see `passes.crop_encode`.
        seen: an event after which the pixels are there, before the encoder; None without a GPU.
    """

    pixels: Tensor
    moments: list[Tensor]
    cropped: bool = False
    seen: Any = None


def joined(conditions: Sequence[Conditions], guided: bool) -> Conditions:
    """Of chunks that share calls: all null halves first, then all heard ones."""
    if len(conditions) == 1:
        return conditions[0]

    def joined(parts: Sequence[Tensor]) -> Tensor:
        halves = [part.chunk(2 if guided else 1) for part in parts]
        return torch.cat([half for kind in zip(*halves, strict=True) for half in kind])

    sounds = [each.audio for each in conditions if each.audio is not None]
    return Conditions(joined(sounds) if sounds else None, joined([c.fixed for c in conditions]))


def redrawn(
    conditions: Conditions, before: Tensor, after: Tensor, factor: float, shift: float
) -> Conditions:
    """Conditions with masked faces from another posterior by the same random numbers.

    Args:
        before, after: parameters (f, 8, h, w) of the posteriors, that drawn from and the other.
        factor, shift: latents are ``(draw - shift) * factor``.
    """
    drawn, other = (DiagonalGaussianDistribution(each.float()) for each in (before, after))
    fixed = conditions.fixed.clone()
    latents = fixed[0, 1:5].transpose(0, 1).float() / factor + shift
    moved = other.mean + (latents - drawn.mean) / drawn.std * other.std
    fixed[:, 1:5] = ((moved - shift) * factor).transpose(0, 1).to(fixed.dtype)
    return Conditions(conditions.audio, fixed)


def vouched_inputs(vae: Any, unet: Any, *, guided: bool) -> frozenset[str]:
    """What holds for the UNet's inputs in all steps of a chunk, see ``runtime.context``."""
    vouched = set()
    if vae.config.latent_channels == 4:
        vouched.add("constant_channels")
    if guided:
        vouched.add("guidance")
        if unet.config.add_audio_layer:
            vouched.add("null_audio")
    return frozenset(vouched)


def example_inputs(
    vae: Any, unet: Any, *, frames: int, tokens: int, guided: bool
) -> dict[str, dict[str, Tensor]]:
    """Zeros of the shapes and dtypes that one chunk of a run has, by module and argument.

    Args:
        vae, unet: where they are is where the inputs are.
        frames: of the chunk.
        tokens: of the sound, for a frame.
        guided: with the doubled batch of guidance.
    """
    config, side = unet.config, int(unet.config.sample_size)
    device, dtype = unet.device, unet.dtype
    batch = 2 if guided else 1
    pictures = frames if device.type == "cpu" else 2 * frames  # see `joint_encoding`
    pixels = side * 2 ** (len(vae.config.block_out_channels) - 1)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    return {
        "unet": {
            "sample": zeros(batch, config.in_channels, frames, side, side),
            "timestep": torch.tensor(501, device=device),
            "encoder_hidden_states": zeros(batch * frames, tokens, config.cross_attention_dim),
        },
        "vae.encoder": {"sample": zeros(pictures, 3, pixels, pixels)},
        "vae.decoder": {"sample": zeros(frames, vae.config.latent_channels, side, side)},
    }

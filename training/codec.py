"""The small VAE: its configuration, a compile-friendly forward pass, calibration, encoding.

A frozen VAE is used in three places (filling the latent bank, evaluation, the final check), so
they share `encode` and `decode`, which work in pieces and return latents of unit variance.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn

SCALING_FACTOR = 0.18215  # Stable Diffusion's, which LatentSync's pipeline expects


def new_vae(widths: tuple[int, ...] = (24, 48, 96, 144), groups: int = 8) -> AutoencoderKL:
    """An untrained f8 VAE with 4 latent channels.

    A few channels a group, as in Stable Diffusion's VAE: with one channel a group the norm before
    the last convolution would take away the colour of the whole picture.
    """
    levels = len(widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=groups,
        sample_size=256,
        scaling_factor=SCALING_FACTOR,
    )


class Autoencode(nn.Module):
    """One training pass: pixels and noise in, reconstruction and moments out."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``pixels (B, 3, H, W)``, ``noise (B, 4, H/8, W/8)``, both of the model's type."""
        mean, log_variance = self.vae.quant_conv(self.vae.encoder(pixels)).chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 10)
        latents = mean + torch.exp(0.5 * log_variance) * noise
        return self.vae.decoder(self.vae.post_quant_conv(latents)), mean, log_variance


@torch.no_grad()
def calibrate(vae: AutoencoderKL, batches: Iterable[Tensor]) -> dict[str, list[float]]:
    """Fold a shift and a scale for each channel into the 1x1 convolutions around the latents.

    Afterwards the latents of ``batches`` (pixels in [-1, 1]), times the scaling factor, have mean
    0 and variance 1 in each channel; reconstructions are unchanged. Returns the moments found.
    """
    means = [vae.encode(pixels).latent_dist.mean.float() for pixels in batches]
    latents = torch.cat(means).transpose(0, 1).flatten(1)  # (4, n)
    shift, spread = latents.mean(1), latents.std(1)
    gain = 1 / (spread * SCALING_FACTOR)
    channels = len(shift)
    moments, back = vae.quant_conv, vae.post_quant_conv
    kind = moments.weight.dtype
    weight, bias = moments.weight.float(), moments.bias.float()
    weight[:channels] *= gain[:, None, None, None]
    bias[:channels] = (bias[:channels] - shift) * gain
    bias[channels:] += 2 * gain.log()
    moments.weight.copy_(weight.to(kind))
    moments.bias.copy_(bias.to(kind))
    weight, bias = back.weight.float(), back.bias.float()
    bias += weight[:, :, 0, 0] @ shift
    weight /= gain[None, :, None, None]
    back.weight.copy_(weight.to(kind))
    back.bias.copy_(bias.to(kind))
    return {"mean": shift.tolist(), "std": spread.tolist()}


def load_vae(folder: Path, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    """The frozen VAE of ``folder`` (diffusers layout)."""
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(str(folder)))
    vae.load_state_dict(load_file(str(folder / "diffusion_pytorch_model.safetensors")))
    vae.requires_grad_(False)
    return vae.to(device, dtype).eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor, *, piece: int = 256) -> Tensor:
    """``(n, 3, H, W)`` in [-1, 1] -> sampled latents ``(n, 4, H/8, W/8)`` of unit variance."""
    kind = vae.dtype
    parts = [vae.encode(p.to(kind)).latent_dist.sample() for p in pixels.split(piece)]
    return torch.cat(parts) * SCALING_FACTOR


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, *, piece: int = 128) -> Tensor:
    """Latents of unit variance ``(n, 4, h, w)`` -> pixels ``(n, 3, 8h, 8w)`` in [-1, 1], fp32."""
    kind = vae.dtype
    parts = [vae.decode(p.to(kind) / SCALING_FACTOR).sample for p in latents.split(piece)]
    return torch.cat(parts).float().clamp(-1, 1)

"""How large the networks are that benchmarks run. Imports no diffusers."""

from __future__ import annotations

from typing import Any

from lsync_compile.models.config import LATENTSYNC_UNET

# The UNet of LatentSync 1.6 (configs/unet/stage2_512.yaml), 1,267 M parameters.
STAGE2_512: dict[str, Any] = {**LATENTSYNC_UNET, "sample_size": 64}
SMALL_UNET: dict[str, Any] = {
    **STAGE2_512,
    "sample_size": 16,
    "block_out_channels": (32, 64, 64, 64),
}
# stabilityai/sd-vae-ft-mse, the VAE of LatentSync, 83.7 M parameters.
SD_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
SMALL_VAE: dict[str, Any] = {**SD_VAE, "block_out_channels": (32, 32, 64, 64)}

"""The passes. Importing this package registers all of them; one file holds one pass."""

from __future__ import annotations

from lsync_compile.passes import (
    channels_last,
    choose_sdpa,
    crop_decode,
    crop_encode,
    fp8_linear,
    fuse_add_layer_norm,
    fuse_geglu,
    fuse_group_norm_silu,
    fuse_layer_norm,
    fuse_linear_geglu,
    fuse_qkv,
    fuse_residual_moments,
    fuse_temporal_attention,
    fuse_upsample_conv,
    guidance_prefix,
    lip_attention,
    null_audio,
    remove_noops,
    share_repeated,
    split_conv_in,
)

__all__ = [
    "channels_last",
    "choose_sdpa",
    "crop_decode",
    "crop_encode",
    "fp8_linear",
    "fuse_add_layer_norm",
    "fuse_geglu",
    "fuse_group_norm_silu",
    "fuse_layer_norm",
    "fuse_linear_geglu",
    "fuse_qkv",
    "fuse_residual_moments",
    "fuse_temporal_attention",
    "fuse_upsample_conv",
    "guidance_prefix",
    "lip_attention",
    "null_audio",
    "remove_noops",
    "share_repeated",
    "split_conv_in",
]

"""Exact Triton kernels as torch operators, each with its torch reference beside it.

Importing this package registers ``torch.ops.lsync.*``. On a GPU they launch Triton kernels, on a
CPU they run their references; see `lsync_compile.kernels.launch`.
"""

from __future__ import annotations

from lsync_compile.kernels.add_layer_norm import add_layer_norm, add_layer_norm_reference
from lsync_compile.kernels.feed_forward import feed_forward, feed_forward_reference
from lsync_compile.kernels.fp8_linear import fp8_linear, fp8_linear_reference
from lsync_compile.kernels.geglu import geglu, geglu_reference
from lsync_compile.kernels.group_norm_from_moments import (
    group_norm_from_moments,
    group_norm_from_moments_reference,
)
from lsync_compile.kernels.group_norm_silu import group_norm_silu, group_norm_silu_reference
from lsync_compile.kernels.layer_norm import layer_norm, layer_norm_reference
from lsync_compile.kernels.linear_geglu import linear_geglu, linear_geglu_reference
from lsync_compile.kernels.lip_attention import lip_attention, lip_attention_reference
from lsync_compile.kernels.residual_moments import (
    residual_moments,
    residual_moments_reference,
)
from lsync_compile.kernels.spatial_attention import (
    spatial_attention,
    spatial_attention_reference,
)
from lsync_compile.kernels.spec import KernelSpec, Tolerance, kernels_table, registered
from lsync_compile.kernels.temporal_attention import (
    temporal_attention,
    temporal_attention_reference,
)
from lsync_compile.kernels.upsample_conv import upsample_conv, upsample_conv_reference

__all__ = [
    "KernelSpec",
    "Tolerance",
    "add_layer_norm",
    "add_layer_norm_reference",
    "feed_forward",
    "feed_forward_reference",
    "fp8_linear",
    "fp8_linear_reference",
    "geglu",
    "geglu_reference",
    "group_norm_from_moments",
    "group_norm_from_moments_reference",
    "group_norm_silu",
    "group_norm_silu_reference",
    "kernels_table",
    "layer_norm",
    "layer_norm_reference",
    "linear_geglu",
    "linear_geglu_reference",
    "lip_attention",
    "lip_attention_reference",
    "registered",
    "residual_moments",
    "residual_moments_reference",
    "spatial_attention",
    "spatial_attention_reference",
    "temporal_attention",
    "temporal_attention_reference",
    "upsample_conv",
    "upsample_conv_reference",
]

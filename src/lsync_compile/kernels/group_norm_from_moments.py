"""Group norm and SiLU of images or videos whose moments were measured where they were written.

As :mod:`~lsync_compile.kernels.group_norm_silu`, but that the input is read once: means and squared
distances of runs of positions, by frame and channel, come from
:mod:`~lsync_compile.kernels.residual_moments`. They are merged by Chan et al. (1979,
http://i.stanford.edu/TR/CS-TR-79-773.html), so that a mean far from zero costs no precision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lsync_compile.errors import OptionError
from lsync_compile.kernels.group_norm_kernels import group_norm_affine
from lsync_compile.kernels.group_norm_silu import apply_affine, fold
from lsync_compile.kernels.launch import runs_kernel
from lsync_compile.kernels.residual_moments import run_length
from lsync_compile.kernels.spec import KernelSpec, Tolerance, register


def group_norm_from_moments_kernel(
    x: Tensor,
    moments: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    silu: bool = True,
) -> Tensor:
    """Launch the kernels on arguments that `group_norm_from_moments` accepts."""
    images, channels = x.shape[:2]
    out = torch.empty_like(x)
    if len(fold(x, out)) > 2:
        x = x.contiguous()
        normal = group_norm_from_moments_kernel(x, moments, groups, weight, bias, eps, silu)
        return out.copy_(normal)
    moments = moments.contiguous()
    positions, width = x.shape[-2] * x.shape[-1], channels // groups
    outer, runs = moments.shape[1] // images, moments.shape[2]
    affine = torch.empty((2, images, channels), dtype=torch.float32, device=x.device)
    group_norm_affine.launch(
        lambda blocks: (groups, images),
        moments[0], moments[1], None, weight.contiguous(), bias.contiguous(), affine[0], affine[1],
        outer, positions, runs, run_length(x), float(outer * positions * width), eps,
        CHANNELS=width, PADDED_CHANNELS=1 << (width - 1).bit_length(),
    )  # fmt: skip
    apply_affine(x, affine, out, silu)
    return out


def group_norm_from_moments_reference(
    x: Tensor,
    moments: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    silu: bool = True,
) -> Tensor:
    """The same in plain torch, at least in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    positions, run = x.shape[-2] * x.shape[-1], run_length(x)
    starts = torch.arange(0, positions, run, device=x.device)
    lengths = (positions - starts).clamp(max=run).to(wide)[:, None]  # (runs, 1)
    # (2, images, frames, runs, groups, channels of a group)
    parts = moments.to(wide).unflatten(1, (x.shape[0], -1)).unflatten(-1, (groups, -1))
    means, squares = parts.unbind(0)
    lengths = lengths[..., None].expand_as(means)
    count = lengths[0, :, :, 0].sum()
    mean = (means * lengths).sum((1, 2, 4)) / count
    distances = means - mean[:, None, None, :, None]
    variance = (squares + lengths * distances.square()).sum((1, 2, 4)) / count
    shape = (x.shape[0], groups, *(1,) * (x.dim() - 1))
    y = x.to(wide).unflatten(1, (groups, -1)) - mean.reshape(shape)
    y = (y * (variance + eps).rsqrt().reshape(shape)).flatten(1, 2)
    per_channel = (-1, *(1,) * (x.dim() - 2))
    y = y * weight.to(wide).reshape(per_channel) + bias.to(wide).reshape(per_channel)
    return (F.silu(y) if silu else y).to(x.dtype)


@torch.library.custom_op(
    "lsync::group_norm_from_moments",
    mutates_args=(),
    schema="(Tensor x, Tensor moments, int groups, Tensor weight, Tensor bias, float eps=1e-5, "
    "bool silu=True) -> Tensor",
)
def group_norm_from_moments(
    x: Tensor,
    moments: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    silu: bool = True,
) -> Tensor:
    """Normalise groups of channels over all positions, by moments measured before.

    Args:
        x: ``(N, C, H, W)`` or ``(N, C, F, H, W)`` in any memory layout; float16, bfloat16 or
            float32.
        moments: ``(2, N*F, R, C)`` of ``x``, float32, from ``residual_moments``; those of tensors
            joined along their channels are joined likewise.
        groups: number of groups; divides C.
        weight, bias: ``(C,)``, of any of these dtypes.
        eps: added to the variance.
        silu: apply ``y * sigmoid(y)`` to the norm.

    Returns:
        The shape and dtype of ``x``, in the memory layout of ``torch.empty_like(x)``.

    Raises:
        OptionError: shapes that do not fit each other.
    """
    _check(x, moments, groups, weight, bias)
    if runs_kernel(x):
        return group_norm_from_moments_kernel(x, moments, groups, weight, bias, eps, silu)
    out = group_norm_from_moments_reference(x, moments, groups, weight, bias, eps, silu)
    return torch.empty_like(x).copy_(out)


@group_norm_from_moments.register_fake
def _fake(
    x: Tensor,
    moments: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    silu: bool = True,
) -> Tensor:
    _check(x, moments, groups, weight, bias)
    return torch.empty_like(x)


def _check(x: Tensor, moments: Tensor, groups: int, weight: Tensor, bias: Tensor) -> None:
    if x.dim() not in (4, 5):
        raise OptionError(
            "group_norm_from_moments: x must be (N, C, H, W) or (N, C, F, H, W), got "
            f"{tuple(x.shape)}"
        )
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise OptionError(
            f"group_norm_from_moments: groups={groups} must divide {channels} channels"
        )
    frames = x.shape[0] * (x.shape[2] if x.dim() == 5 else 1)
    runs = -(-x.shape[-2] * x.shape[-1] // run_length(x))
    if moments.shape != (2, frames, runs, channels):
        raise OptionError(
            f"group_norm_from_moments: moments {tuple(moments.shape)} must be "
            f"{(2, frames, runs, channels)}"
        )
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise OptionError(
            f"group_norm_from_moments: weight {tuple(weight.shape)} and bias {tuple(bias.shape)} "
            f"must be ({channels},)"
        )


SPEC = register(
    KernelSpec(
        name="group_norm_from_moments",
        summary="Group norm by moments measured before, SiLU after it if wanted",
        op=group_norm_from_moments,
        kernel=group_norm_from_moments_kernel,
        reference=group_norm_from_moments_reference,
        source="Chan et al. (1979), http://i.stanford.edu/TR/CS-TR-79-773.html",
        tolerances={
            torch.float32: Tolerance(1e-5, "float32 statistics over up to millions of values"),
            torch.float16: Tolerance(5e-4, "the result is rounded to 11 bits"),
            torch.bfloat16: Tolerance(4e-3, "the result is rounded to 8 bits"),
        },
    )
)

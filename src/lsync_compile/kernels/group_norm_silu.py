"""Group norm over an image or a whole video, with the SiLU after it, in any memory layout.

``out = y * sigmoid(y)`` or ``y`` itself, ``y = (x - mean) / sqrt(var + eps) * weight + bias``,
mean and variance over the channels of a group and all positions (Wu & He, 2018,
https://arxiv.org/abs/1803.08494): height and width of ``(N, C, H, W)``, frames too of
``(N, C, F, H, W)``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lsync_compile.errors import OptionError
from lsync_compile.kernels.group_norm_kernels import (
    SMALL_GROUP,
    group_norm_affine,
    group_norm_apply,
    group_norm_moments,
    group_norm_small,
)
from lsync_compile.kernels.launch import runs_kernel
from lsync_compile.kernels.spec import KernelSpec, Tolerance, register


def group_norm_silu_kernel(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    silu: bool = True,
    shift: Tensor | None = None,
) -> Tensor:
    """Launch the kernels on arguments that `group_norm_silu` accepts."""
    images, channels = x.shape[:2]
    out = torch.empty_like(x)
    folded = fold(x, out)
    if len(folded) > 2:
        x = x.contiguous()
        return out.copy_(group_norm_silu_kernel(x, groups, weight, bias, eps, silu, shift))
    (outer, x_f, _), (positions, x_p, out_p) = [(1, 0, 0), (1, 0, 0), *folded][-2:]
    x_n, x_c, out_n, out_c = *x.stride()[:2], *out.stride()[:2]
    weight, bias = weight.contiguous(), bias.contiguous()
    shift = None if shift is None else shift.contiguous()

    width = channels // groups
    padded = {"PADDED_CHANNELS": _power_of_two(width)}
    if outer == 1 and padded["PADDED_CHANNELS"] * _power_of_two(positions) <= SMALL_GROUP:
        group_norm_small.launch(
            lambda blocks: (groups, images),
            x, shift, weight, bias, out, positions, groups,
            x_n, x_p, x_c, out_n, out_p, out_c, eps,
            CHANNELS=width, PADDED_POSITIONS=_power_of_two(positions), SILU=silu, **padded,
        )  # fmt: skip
        return out

    block_c = _channels_together(x, positions)
    columns, slabs = -(-channels // block_c), images * outer
    run = _run_length(columns * slabs * positions)
    runs = -(-positions // run)
    moments = torch.empty((2, slabs, runs, channels), dtype=torch.float32, device=x.device)
    affine = torch.empty((2, images, channels), dtype=torch.float32, device=x.device)
    group_norm_moments.launch(
        lambda blocks: (columns * runs, slabs),
        x, shift, moments[0], moments[1], outer, positions, channels, run,
        x_n, x_f, x_p, x_c,
        BLOCK_C=block_c,
    )  # fmt: skip
    group_norm_affine.launch(
        lambda blocks: (groups, images),
        moments[0], moments[1], shift, weight, bias, affine[0], affine[1],
        outer, positions, runs, run, float(outer * positions * width), eps,
        CHANNELS=width, **padded,
    )  # fmt: skip
    apply_affine(x, affine, out, silu)
    return out


def apply_affine(x: Tensor, affine: Tensor, out: Tensor, silu: bool) -> None:
    """Write ``x * affine[0] + affine[1]``, and SiLU of it, to ``out``.

    Args:
        x, out: of one shape, such that `fold` gives at most two dimensions.
        affine: ``(2, N, C)``, float32.
    """
    (outer, x_f, out_f), (positions, x_p, out_p) = [(1, 0, 0), (1, 0, 0), *fold(x, out)][-2:]
    x_n, x_c, out_n, out_c = *x.stride()[:2], *out.stride()[:2]
    images, channels = x.shape[:2]
    block_c = _channels_together(x, positions)
    columns = -(-channels // block_c)
    group_norm_apply.launch(
        lambda blocks: (columns * -(-positions * block_c // blocks["TILE"]), images * outer),
        x, affine[0], affine[1], out, outer, positions, channels,
        x_n, x_f, x_p, x_c, out_n, out_f, out_p, out_c,
        SILU=silu, BLOCK_C=block_c,
    )  # fmt: skip


def _channels_together(x: Tensor, positions: int) -> int:
    """Channels of a tile: lanes run along the dimension that lies together in memory."""
    wanted = x.shape[1] if x.stride(1) == 1 else max(8, 4096 // _power_of_two(positions))
    return min(64, _power_of_two(wanted))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _run_length(rows: int) -> int:
    """Positions that one program reduces: enough programs, yet few results to merge."""
    programs = 2048  # some fifteen for each multiprocessor of a large GPU
    return min(max(_power_of_two(rows // programs + 1) // 2, 64), 4096)


def fold(x: Tensor, out: Tensor) -> list[tuple[int, int, int]]:
    """Size, stride in ``x`` and stride in ``out`` of the positions' dimensions, from the outside.

    Neighbours that both tensors store as one are merged, dimensions of size one left out.
    """
    folded: list[tuple[int, int, int]] = []
    for size, a, b in zip(x.shape[2:], x.stride()[2:], out.stride()[2:], strict=True):
        if size == 1:
            continue
        if folded and folded[-1][1] == size * a and folded[-1][2] == size * b:
            size *= folded.pop()[0]
        folded.append((size, a, b))
    return folded


def group_norm_silu_reference(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    silu: bool = True,
    shift: Tensor | None = None,
) -> Tensor:
    """The same with torch's group norm, at least in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    # Contiguous: on a CPU torch sums squares of channels-last values without a shift.
    y = x.to(wide).contiguous()
    if shift is not None:
        y = y + shift.to(wide).reshape(shift.shape + (1,) * (x.dim() - 2))
    y = F.group_norm(y, groups, weight.to(wide), bias.to(wide), eps)
    return (F.silu(y) if silu else y).to(x.dtype)


@torch.library.custom_op(
    "lsync::group_norm_silu",
    mutates_args=(),
    schema="(Tensor x, int groups, Tensor weight, Tensor bias, float eps=1e-5, bool silu=True, "
    "Tensor? shift=None) -> Tensor",
)
def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    silu: bool = True,
    shift: Tensor | None = None,
) -> Tensor:
    """Normalise groups of channels over all positions of an image or video.

    Args:
        x: ``(N, C, H, W)`` or ``(N, C, F, H, W)`` in any memory layout (channels-last and
            contiguous ones are read in whole lines); float16, bfloat16 or float32.
        groups: number of groups; divides C.
        weight, bias: ``(C,)``, of any of these dtypes.
        eps: added to the variance.
        silu: apply ``y * sigmoid(y)`` to the norm.
        shift: ``(N, C)``, added to ``x`` at every position before all else, such as a projected
            time embedding. The sum is never rounded to ``x``'s dtype.

    Returns:
        The shape and dtype of ``x``, in the memory layout of ``torch.empty_like(x)``: the strides
        of ``x`` where it has no gaps.

    Raises:
        OptionError: shapes that do not fit each other.
    """
    _check(x, groups, weight, bias, shift)
    if runs_kernel(x):
        return group_norm_silu_kernel(x, groups, weight, bias, eps, silu, shift)
    out = group_norm_silu_reference(x, groups, weight, bias, eps, silu, shift)
    return torch.empty_like(x).copy_(out)


@group_norm_silu.register_fake
def _fake(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    silu: bool = True,
    shift: Tensor | None = None,
) -> Tensor:
    _check(x, groups, weight, bias, shift)
    return torch.empty_like(x)


def _check(x: Tensor, groups: int, weight: Tensor, bias: Tensor, shift: Tensor | None) -> None:
    if x.dim() not in (4, 5):
        raise OptionError(
            f"group_norm_silu: x must be (N, C, H, W) or (N, C, F, H, W), got {tuple(x.shape)}"
        )
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise OptionError(f"group_norm_silu: groups={groups} must divide {channels} channels")
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise OptionError(
            f"group_norm_silu: weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must be "
            f"({channels},)"
        )
    if shift is not None and shift.shape != x.shape[:2]:
        raise OptionError(
            f"group_norm_silu: shift {tuple(shift.shape)} must be {tuple(x.shape[:2])}"
        )


SPEC = register(
    KernelSpec(
        name="group_norm_silu",
        summary="Group norm over images or whole videos, SiLU after it if wanted",
        op=group_norm_silu,
        kernel=group_norm_silu_kernel,
        reference=group_norm_silu_reference,
        source="Wu & He (2018), https://arxiv.org/abs/1803.08494",
        tolerances={
            torch.float32: Tolerance(1e-5, "float32 statistics over up to millions of values"),
            torch.float16: Tolerance(5e-4, "the result is rounded to 11 bits"),
            torch.bfloat16: Tolerance(4e-3, "the result is rounded to 8 bits"),
        },
    )
)

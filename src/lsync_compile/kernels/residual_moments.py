# mypy: allow-untyped-defs, allow-incomplete-defs
"""A convolution's bias and the residual sum, and the moments that the next group norm asks for.

``sum = x + residual + bias``, one bias a channel, and of each run of positions of each frame and
channel the mean of ``sum`` and the sum of squared distances from it. The numbers that a sum writes
are in registers then, so that a norm after it
(:mod:`~lsync_compile.kernels.group_norm_from_moments`) reads them once and not twice. Updates are
Welford's (1962, https://doi.org/10.1080/00401706.1962.10490022), as exact as where the norm
measures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lsync_compile.errors import OptionError
from lsync_compile.kernels.launch import Config, kernel, runs_kernel, tl
from lsync_compile.kernels.spec import KernelSpec, Tolerance, register


@kernel(
    [
        Config({"TILE": 2048}),
        Config({"TILE": 4096}, warps=8),
        Config({"TILE": 2048}, warps=8),
    ],
    key=("positions", "channels", "x_stride_c", "r_stride_c"),
)
def _residual_moments(
    x_ptr,  # (images, outer, positions, channels), any strides
    residual_ptr,  # like x, strides of its own, or none
    bias_ptr,  # (channels,) or none
    out_ptr,  # like x, strides of its own
    mean_ptr,  # (images * outer, runs, channels), float32
    squares_ptr,  # like mean: sums of squared distances from it
    outer,
    positions,
    channels,
    run,  # positions of one program
    x_stride_n,
    x_stride_f,
    x_stride_p,
    x_stride_c,
    r_stride_n,
    r_stride_f,
    r_stride_p,
    r_stride_c,
    out_stride_n,
    out_stride_f,
    out_stride_p,
    out_stride_c,
    BLOCK_C: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK_P: tl.constexpr = TILE // BLOCK_C
    columns = tl.cdiv(channels, BLOCK_C)
    slab, block = tl.program_id(1), tl.program_id(0) // columns
    image, frame = (slab // outer).to(tl.int64), (slab % outer).to(tl.int64)
    first = block.to(tl.int64) * run
    count = tl.minimum(run, positions - block * run)
    c = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    x_at = x_ptr + image * x_stride_n + frame * x_stride_f + first * x_stride_p
    x_at += c[None, :] * x_stride_c + p[:, None] * x_stride_p
    out_at = out_ptr + image * out_stride_n + frame * out_stride_f + first * out_stride_p
    out_at += c[None, :] * out_stride_c + p[:, None] * out_stride_p
    if residual_ptr is not None:
        r_at = residual_ptr + image * r_stride_n + frame * r_stride_f + first * r_stride_p
        r_at += c[None, :] * r_stride_c + p[:, None] * r_stride_p
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, c < channels, 0.0).to(tl.float32)

    # Welford's update in every element of the tile; no exchange between threads in the loop.
    mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    step = 0.0
    for start in range(0, count, BLOCK_P):
        inside = (start + p < count)[:, None] & (c < channels)[None, :]
        x = tl.load(x_at, inside, 0.0).to(tl.float32)
        if residual_ptr is not None:
            x += tl.load(r_at, inside, 0.0).to(tl.float32)
            r_at += BLOCK_P * r_stride_p
        if bias_ptr is not None:
            x += bias[None, :]
        tl.store(out_at, x.to(out_ptr.dtype.element_ty), inside)
        step += 1.0
        delta = tl.where(inside, x - mean, 0.0)
        mean += delta * (1.0 / step)
        squares += delta * (x - mean)
        x_at += BLOCK_P * x_stride_p
        out_at += BLOCK_P * out_stride_p

    seen = ((count - p + BLOCK_P - 1) // BLOCK_P).to(tl.float32)[:, None]  # by each row
    total = tl.sum(mean * seen, 0) / count
    distance = mean - total[None, :]
    squares = tl.sum(squares + seen * distance * distance, 0)
    at = (slab * tl.cdiv(positions, run) + block).to(tl.int64) * channels + c
    tl.store(mean_ptr + at, total, c < channels)
    tl.store(squares_ptr + at, squares, c < channels)


def run_length(x: Tensor) -> int:
    """Positions whose moments are taken together; the channels do not matter.

    Some 2,000 programs or more on pictures large enough, and few results to merge.
    """
    programs = 2048
    rows = 4 * _frames(x) * _positions(x)
    return min(max(1 << (rows // programs).bit_length() >> 1, 64), 4096)


def residual_moments_kernel(
    x: Tensor, residual: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launch the kernel on arguments that `residual_moments` accepts."""
    out = torch.empty_like(x)
    moments = torch.empty(_moments_shape(x), dtype=torch.float32, device=x.device)
    channels, positions, outer = x.shape[1], _positions(x), _frames(x) // x.shape[0]
    places = _places(out)
    if places is None:  # height and width are no one dimension: work on a copy
        parts = [x.contiguous(), None if residual is None else residual.contiguous()]
        total, moments = residual_moments_kernel(parts[0], parts[1], bias)  # type: ignore[arg-type]
        return out.copy_(total), moments
    x, residual = _foldable(x, out), None if residual is None else _foldable(residual, out)
    wanted = channels if x.stride(1) == 1 else 8
    block_c = min(64, 1 << (wanted - 1).bit_length())
    columns = -(-channels // block_c)
    _residual_moments.launch(
        lambda blocks: (columns * moments.shape[2], _frames(x)),
        x, residual, None if bias is None else bias.contiguous(), out, moments[0], moments[1],
        outer, positions, channels, run_length(x),
        *(_places(x) or ()), *(_places(x if residual is None else residual) or ()), *places,
        BLOCK_C=block_c,
    )  # fmt: skip
    return out, moments


def _places(x: Tensor) -> tuple[int, int, int, int] | None:
    """Strides of images, frames, positions and channels; None where positions have no one."""
    height, width = x.shape[-2:]
    if height > 1 and width > 1 and x.stride(-2) != width * x.stride(-1):
        return None
    frame = x.stride(2) if x.dim() == 5 else 0
    position = x.stride(-1) if width > 1 else x.stride(-2)
    return x.stride(0), frame, position, x.stride(1)


def _foldable(x: Tensor, like: Tensor) -> Tensor:
    """``x``, copied into another's layout where its positions have no stride in common."""
    return torch.empty_like(like).copy_(x) if _places(x) is None else x


def residual_moments_reference(
    x: Tensor, residual: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same in plain torch, at least in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide)
    if residual is not None:
        total = total + residual.to(wide)
    if bias is not None:
        total = total + bias.to(wide).reshape(-1, *(1,) * (x.dim() - 2))
    by_frame = total.movedim(1, -1).reshape(_frames(x), _positions(x), x.shape[1])
    parts = by_frame.split(run_length(x), 1)
    means = torch.stack([part.mean(1) for part in parts], 1)
    distances = zip(parts, means.unbind(1), strict=True)
    squares = torch.stack([(part - mean[:, None]).square().sum(1) for part, mean in distances], 1)
    return total.to(x.dtype), torch.stack([means, squares])


@torch.library.custom_op(
    "lsync::residual_moments",
    mutates_args=(),
    schema="(Tensor x, Tensor? residual, Tensor? bias) -> (Tensor, Tensor)",
)
def residual_moments(
    x: Tensor, residual: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Add a residual and a bias, and measure the sum for a group norm.

    Args:
        x: ``(N, C, H, W)`` or ``(N, C, F, H, W)`` in any memory layout (channels-last ones are
            read in whole lines); float16, bfloat16 or float32.
        residual: of ``x``'s shape and dtype, in any layout, or none.
        bias: ``(C,)``, of any of these dtypes, or none.

    Returns:
        The sum, rounded once, of ``x``'s shape and dtype and in the memory layout of
        ``torch.empty_like(x)``; and its moments before rounding, ``(2, N*F, R, C)`` in float32 by
        frames and runs of `run_length` positions: means, then sums of squared distances from them.

    Raises:
        OptionError: shapes or dtypes that do not fit each other.
    """
    _check(x, residual, bias)
    if runs_kernel(x):
        return residual_moments_kernel(x, residual, bias)
    total, moments = residual_moments_reference(x, residual, bias)
    return torch.empty_like(x).copy_(total), moments


@residual_moments.register_fake
def _fake(x: Tensor, residual: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    _check(x, residual, bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x), x.new_empty(_moments_shape(x), dtype=wide)


def _frames(x: Tensor) -> int:
    return x.shape[0] * (x.shape[2] if x.dim() == 5 else 1)


def _positions(x: Tensor) -> int:
    return x.shape[-2] * x.shape[-1]


def _moments_shape(x: Tensor) -> tuple[int, int, int, int]:
    return 2, _frames(x), -(-_positions(x) // run_length(x)), x.shape[1]


def _check(x: Tensor, residual: Tensor | None, bias: Tensor | None) -> None:
    if x.dim() not in (4, 5):
        raise OptionError(
            f"residual_moments: x must be (N, C, H, W) or (N, C, F, H, W), got {tuple(x.shape)}"
        )
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise OptionError(
            f"residual_moments: residual {tuple(residual.shape)} {residual.dtype} must be "
            f"{tuple(x.shape)} {x.dtype}"
        )
    if bias is not None and bias.shape != (x.shape[1],):
        raise OptionError(f"residual_moments: bias {tuple(bias.shape)} must be ({x.shape[1]},)")


SPEC = register(
    KernelSpec(
        name="residual_moments",
        summary="Residual sum with a bias, and the moments of the sum by frame and channel",
        op=residual_moments,
        kernel=residual_moments_kernel,
        reference=residual_moments_reference,
        source="Welford (1962), https://doi.org/10.1080/00401706.1962.10490022",
        tolerances={
            torch.float32: Tolerance(1e-6, "float32 arithmetic"),
            torch.float16: Tolerance(5e-4, "the sum is rounded to 11 bits"),
            torch.bfloat16: Tolerance(4e-3, "the sum is rounded to 8 bits"),
        },
    )
)

# mypy: allow-untyped-defs, allow-incomplete-defs
"""The Triton kernels behind `lsync_compile.kernels.group_norm_silu`.

Small groups take one program and one reading of the input each. Large ones are split:
`group_norm_moments` reduces runs of positions channel by channel, `group_norm_affine` merges the
runs and channels of a group into a scale and an offset for each channel, `group_norm_apply` reads
the input again. Updates are Welford's and merges Chan's, so a mean far from zero costs no
precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lsync_compile.kernels.launch import Config, kernel, tl

SMALL_GROUP = 16384  # values that one program can hold, with padding


def _fits(config: Config, arguments: Mapping[str, Any]) -> bool:
    """16 to 64 values a thread, or the fewest threads."""
    values: int = arguments["PADDED_CHANNELS"] * arguments["PADDED_POSITIONS"]
    return values <= 2048 * config.warps and (config.warps == 4 or values >= 512 * config.warps)


@kernel(
    [Config({}, warps=4), Config({}, warps=8), Config({}, warps=16)],
    key=("positions", "CHANNELS", "x_stride_c", "SILU"),
    fits=_fits,
)
def group_norm_small(
    x_ptr,  # (images, groups * CHANNELS, positions), any strides
    shift_ptr,  # (images, groups * CHANNELS), added to x, or none
    weight_ptr,  # (groups * CHANNELS,)
    bias_ptr,  # (groups * CHANNELS,)
    out_ptr,  # like x, strides of its own
    positions,
    groups,
    x_stride_n,
    x_stride_p,
    x_stride_c,
    out_stride_n,
    out_stride_p,
    out_stride_c,
    eps,
    CHANNELS: tl.constexpr,  # channels of a group
    PADDED_CHANNELS: tl.constexpr,
    PADDED_POSITIONS: tl.constexpr,
    SILU: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * CHANNELS
    c = tl.arange(0, PADDED_CHANNELS)
    p = tl.arange(0, PADDED_POSITIONS)[:, None]
    inside = (p < positions) & (c < CHANNELS)[None, :]
    count = positions * CHANNELS

    x_at = x_ptr + image * x_stride_n + ((first + c)[None, :] * x_stride_c + p * x_stride_p)
    x = tl.load(x_at, inside, 0.0).to(tl.float32)
    weight = tl.load(weight_ptr + first + c, c < CHANNELS, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + first + c, c < CHANNELS, 0.0).to(tl.float32)
    if shift_ptr is not None:
        shift_at = shift_ptr + image * groups * CHANNELS + first + c
        shift = tl.load(shift_at, c < CHANNELS, 0.0).to(tl.float32)
        x = tl.where(inside, x + shift[None, :], 0.0)
    mean = tl.sum(x) / count
    x = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x) / count + eps)
    out = x * (rstd * weight)[None, :] + bias[None, :]
    if SILU:
        out = out * tl.sigmoid(out)
    out_at = out_ptr + image * out_stride_n
    out_at += (first + c)[None, :] * out_stride_c + p * out_stride_p
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), inside)


_TILES = [Config({"TILE": 4096}), Config({"TILE": 4096}, warps=8), Config({"TILE": 2048})]


@kernel(_TILES, key=("positions", "channels", "stride_c"))
def group_norm_moments(
    x_ptr,  # (images, outer, positions, channels), any strides
    shift_ptr,  # (images, channels), added to x, or none
    mean_ptr,  # (images, outer, runs, channels), float32
    squares_ptr,  # like mean: sums of squared distances from it
    outer,
    positions,
    channels,
    run,  # positions of one program
    stride_n,
    stride_f,
    stride_p,
    stride_c,
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
    x_at = x_ptr + image * stride_n + frame * stride_f + first * stride_p
    x_at += c[None, :] * stride_c + p[:, None] * stride_p
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + image * channels + c, c < channels, 0.0).to(tl.float32)

    # Welford's update in every element of the tile; no exchange between threads in the loop.
    mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    step = 0.0
    for start in range(0, count, BLOCK_P):
        inside = (start + p < count)[:, None] & (c < channels)[None, :]
        x = tl.load(x_at, inside, 0.0).to(tl.float32)
        if shift_ptr is not None:
            x += shift[None, :]
        step += 1.0
        delta = tl.where(inside, x - mean, 0.0)
        mean += delta * (1.0 / step)
        squares += delta * (x - mean)
        x_at += BLOCK_P * stride_p

    seen = ((count - p + BLOCK_P - 1) // BLOCK_P).to(tl.float32)[:, None]  # by each row
    total = tl.sum(mean * seen, 0) / count
    distance = mean - total[None, :]
    squares = tl.sum(squares + seen * distance * distance, 0)
    at = (slab * tl.cdiv(positions, run) + block).to(tl.int64) * channels + c
    tl.store(mean_ptr + at, total, c < channels)
    tl.store(squares_ptr + at, squares, c < channels)


def _fits_slots(config: Config, arguments: Mapping[str, Any]) -> bool:
    """All slots at once where there are few, at most 32 values a thread, or registers spill."""
    slots, block = arguments["outer"] * arguments["runs"], config.blocks["BLOCK"]
    values: int = block * arguments["PADDED_CHANNELS"]
    few = values <= 1024 * config.warps and (block == 64 or block <= 2 * slots)
    return few and (config.warps <= 4 or values >= 512 * config.warps)


@kernel(
    [
        Config({"BLOCK": 64}),
        Config({"BLOCK": 64}, warps=1),
        Config({"BLOCK": 64}, warps=8),
        Config({"BLOCK": 256}),
    ],
    key=("outer", "runs", "CHANNELS"),
    fits=_fits_slots,
)
def group_norm_affine(
    mean_ptr,  # (images, outer, runs, groups * CHANNELS), float32
    squares_ptr,  # like mean
    shift_ptr,  # (images, groups * CHANNELS) or none
    weight_ptr,  # (groups * CHANNELS,)
    bias_ptr,  # (groups * CHANNELS,)
    scale_ptr,  # (images, groups * CHANNELS), float32
    offset_ptr,  # like scale
    outer,
    positions,
    runs,
    run,  # positions of a run but the last
    count,  # values of a group, as a float
    eps,
    CHANNELS: tl.constexpr,  # channels of a group
    PADDED_CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channels = tl.num_programs(0) * CHANNELS
    image = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, PADDED_CHANNELS)
    c = tl.program_id(0) * CHANNELS + lane
    slot = tl.arange(0, BLOCK)[:, None]
    slots = outer * runs
    mean_ptr += image * slots * channels
    squares_ptr += image * slots * channels

    weight = tl.load(weight_ptr + c, lane < CHANNELS, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, lane < CHANNELS, 0.0).to(tl.float32)
    shift = tl.zeros((PADDED_CHANNELS,), tl.float32)
    if shift_ptr is not None:
        shift_at = shift_ptr + image * channels + c
        shift += tl.load(shift_at, lane < CHANNELS, 0.0).to(tl.float32)

    # The first slots, most often all, are read once and kept.
    inside = (slot < slots) & (lane < CHANNELS)[None, :]
    length = tl.minimum(run, positions - slot % runs * run).to(tl.float32)
    at = slot * channels + c[None, :]
    means = tl.load(mean_ptr + at, inside, 0.0)
    sums = tl.load(squares_ptr + at, inside, 0.0)
    totals = means * length
    for start in range(BLOCK, slots, BLOCK):
        more = (start + slot < slots) & (lane < CHANNELS)[None, :]
        further = tl.minimum(run, positions - (start + slot) % runs * run).to(tl.float32)
        totals += tl.load(mean_ptr + start * channels + at, more, 0.0) * further
    mean = tl.sum(totals) / count

    distance = tl.where(inside, means - mean, 0.0)
    sums += length * distance * distance
    for start in range(BLOCK, slots, BLOCK):
        more = (start + slot < slots) & (lane < CHANNELS)[None, :]
        further = tl.minimum(run, positions - (start + slot) % runs * run).to(tl.float32)
        read = tl.load(mean_ptr + start * channels + at, more, 0.0)
        distance = tl.where(more, read - mean, 0.0)
        read = tl.load(squares_ptr + start * channels + at, more, 0.0)
        sums += read + further * distance * distance
    rstd = tl.rsqrt(tl.sum(sums) / count + eps)

    at = image * channels + c
    tl.store(scale_ptr + at, weight * rstd, lane < CHANNELS)
    tl.store(offset_ptr + at, (shift - mean) * (weight * rstd) + bias, lane < CHANNELS)


@kernel(_TILES, key=("positions", "channels", "x_stride_c", "SILU"))
def group_norm_apply(
    x_ptr,  # (images, outer, positions, channels), any strides
    scale_ptr,  # (images, channels), float32
    offset_ptr,  # like scale
    out_ptr,  # like x, strides of its own
    outer,
    positions,
    channels,
    x_stride_n,
    x_stride_f,
    x_stride_p,
    x_stride_c,
    out_stride_n,
    out_stride_f,
    out_stride_p,
    out_stride_c,
    SILU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK_P: tl.constexpr = TILE // BLOCK_C
    # What `group_norm_moments` read last may still be in the cache, so start there.
    columns = tl.cdiv(channels, BLOCK_C)
    slab = tl.num_programs(1) - 1 - tl.program_id(1)
    block = (tl.num_programs(0) - 1 - tl.program_id(0)) // columns
    image, frame = (slab // outer).to(tl.int64), (slab % outer).to(tl.int64)
    first = block.to(tl.int64) * BLOCK_P
    c = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    inside = (first + p < positions)[:, None] & (c < channels)[None, :]

    scale = tl.load(scale_ptr + image * channels + c, c < channels, 0.0)
    offset = tl.load(offset_ptr + image * channels + c, c < channels, 0.0)
    x_at = x_ptr + image * x_stride_n + frame * x_stride_f + first * x_stride_p
    x_at += c[None, :] * x_stride_c + p[:, None] * x_stride_p
    out = tl.load(x_at, inside, 0.0).to(tl.float32) * scale[None, :] + offset[None, :]
    if SILU:
        out = out * tl.sigmoid(out)
    out_at = out_ptr + image * out_stride_n + frame * out_stride_f + first * out_stride_p
    out_at += c[None, :] * out_stride_c + p[:, None] * out_stride_p
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), inside)

# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention within frames of which only the mouth is of interest: full there, pooled elsewhere.

Tokens of the mouth region and a halo attend, and are attended to, one by one. All others are pooled
by square cells, queries and keys alike: a cell's query is the mean of its tokens' and its result is
that of all of them; its key and value are means too, and count as many times as it has tokens
(proportional attention, Bolya et al., 2023, https://arxiv.org/abs/2210.09461)::

    out[i] = sum_g softmax_g(scale * <q(i), k_g> + log n_g + [g is lips] log w) v_g

where g runs over groups of n_g tokens and q(i) is the mean of the queries in token i's group. With
cells of one token and a weight of 1 this is plain attention.

The weights cost the attention nothing: `lip_rows` copies the rows of groups together and gives each
head two more channels, ones in the queries and the weights' logarithm in the keys. So any of
`spatial_attention`'s kernels does the attention itself, over a third of the scores.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lsync_compile.errors import OptionError
from lsync_compile.kernels.launch import Config, kernel, runs_kernel, tl
from lsync_compile.kernels.lip_tables import (
    Grouping,
    grouping_on,
    key_channels,
    query_channels,
    tokens_alone,
)
from lsync_compile.kernels.spatial_attention import spatial_attention_kernel
from lsync_compile.kernels.spec import KernelSpec, Tolerance, register


def _fits(config: Config, arguments: Mapping[str, Any]) -> bool:
    """Few sums a thread, so that none is spilled."""
    return bool(config.blocks["ROWS"] * arguments["BLOCK"] <= 32 * 32 * config.warps)


@kernel(
    [Config({"ROWS": 32}, warps=4), Config({"ROWS": 64}, warps=4), Config({"ROWS": 16}, warps=4)],
    key=("rows", "stride_xs", "HEADS", "DIM", "MEMBERS"),
    fits=_fits,
)
def _lip_rows(
    x_ptr,  # (batch, tokens, HEADS, WIDTH_IN), of which DIM channels are read
    members_ptr,  # (rows, MEMBERS) int32, tokens; -1 for none
    counts_ptr,  # (rows,) int32
    extra_ptr,  # (rows, 2) float32, only read with EXTRA
    out_ptr,  # (batch, rows, HEADS, WIDTH_OUT), contiguous
    rows,
    stride_xb,
    stride_xs,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH_IN: tl.constexpr,
    WIDTH_OUT: tl.constexpr,
    MEMBERS: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)[None, :]
    count = tl.load(counts_ptr + row, row < rows, 1)
    x_at = x_ptr + batch * stride_xb + head * WIDTH_IN + channel
    mean = tl.zeros((ROWS, BLOCK), tl.float32)
    for number in range(tl.max(count, 0)):
        member = tl.load(members_ptr + row * MEMBERS + number, (row < rows) & (number < count), -1)
        inside = (member >= 0)[:, None] & (channel < DIM)
        mean += tl.load(x_at + member[:, None].to(tl.int64) * stride_xs, inside, 0.0).to(tl.float32)
    mean = mean / count[:, None]
    if EXTRA:
        first = tl.load(extra_ptr + row * 2, row < rows, 0.0)[:, None]
        second = tl.load(extra_ptr + row * 2 + 1, row < rows, 0.0)[:, None]
        mean = tl.where(channel == DIM, first, mean)
        mean = tl.where(channel == DIM + 1, second, mean)
    out_at = out_ptr + ((batch * rows + row[:, None]) * HEADS + head) * WIDTH_OUT + channel
    tl.store(
        out_at, mean.to(out_ptr.dtype.element_ty), (row < rows)[:, None] & (channel < WIDTH_OUT)
    )


def lip_rows(
    x: Tensor,
    members: Tensor,
    counts: Tensor,
    heads: int,
    dim: int,
    width: int,
    extra: Tensor | None = None,
) -> Tensor:
    """Means of rows, with the channels of each head filled up.

    Args:
        x: ``(n, tokens, heads*w)``; the first ``dim`` channels of each head's ``w`` are read.
        members: ``(rows, P)`` int32, which tokens make a row; -1 fills up.
        counts: ``(rows,)`` int32, how many they are.
        heads: heads of x.
        dim: channels of a head.
        width: channels of a head in the result.
        extra: ``(rows, 2)`` float32, the channels ``dim`` and ``dim + 1`` of each head.

    Returns:
        ``(n, rows, heads*width)``, contiguous; channels that nothing gives are 0.
    """
    batch, rows = x.shape[0], len(counts)
    out = torch.empty((batch, rows, heads * width), dtype=x.dtype, device=x.device)
    _lip_rows.launch(
        lambda blocks: (-(-rows // blocks["ROWS"]), batch * heads),
        x, members, counts, counts if extra is None else extra, out,
        rows, x.stride(0), x.stride(1),
        HEADS=heads, DIM=dim, WIDTH_IN=x.shape[2] // heads, WIDTH_OUT=width,
        MEMBERS=members.shape[1], EXTRA=extra is not None,
        BLOCK=max(16, 1 << (width - 1).bit_length()),
    )  # fmt: skip
    return out


def lip_attention_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    region: str,
    halo: int,
    query_pool: int,
    key_pool: int,
    lip_weight: float,
    scale: float | None = None,
) -> Tensor:
    """Copy groups together, attend, copy each group's result to its tokens."""
    if query_pool == key_pool == 1 and lip_weight == 1:
        return spatial_attention_kernel(q, k, v, heads, scale)
    dim = q.shape[2] // heads
    factor = dim**-0.5 if scale is None else scale
    queries, keys = _groups(q, region, halo, query_pool, key_pool, lip_weight)
    width = dim + 8  # two channels are needed; all kernels like multiples of eight
    ones, weights = query_channels(queries), key_channels(keys, factor, q.dtype)
    attended = spatial_attention_kernel(
        lip_rows(q, queries.members, queries.counts, heads, dim, width, ones),
        lip_rows(k, keys.members, keys.counts, heads, dim, width, weights),
        lip_rows(v, keys.members, keys.counts, heads, dim, width),
        heads,
        factor,
    )
    return lip_rows(attended, queries.group_of[:, None], tokens_alone(queries), heads, dim, dim)


def lip_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    region: str,
    halo: int,
    query_pool: int,
    key_pool: int,
    lip_weight: float,
    scale: float | None = None,
) -> Tensor:
    """The same with a mask that is added to the scores."""
    if q.dtype == torch.float64 and q.shape[0] > 1:
        # No GPU kernel takes it, and the scores of all rows together would not fit.
        alone = functools.partial(
            lip_attention_reference,
            heads=heads,
            region=region,
            halo=halo,
            query_pool=query_pool,
            key_pool=key_pool,
            lip_weight=lip_weight,
            scale=scale,
        )
        return torch.cat(list(map(alone, q.split(1), k.split(1), v.split(1))))
    queries, keys = _groups(q, region, halo, query_pool, key_pool, lip_weight)
    q, k, v = (
        _means(x, groups).unflatten(2, (heads, -1)).transpose(1, 2)
        for x, groups in ((q, queries), (k, keys), (v, keys))
    )
    bias = keys.log_weights.to(q.dtype)[None, None, None]
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    rows_of_groups = attended.transpose(1, 2).flatten(2)
    return rows_of_groups.index_select(1, queries.group_of).contiguous()


def _means(x: Tensor, groups: Grouping) -> Tensor:
    """``(n, L, C)`` to the mean of each group, ``(n, G, C)``, summed in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    single = x.index_select(1, groups.members[: groups.alone, 0])
    members, counts = groups.members[groups.alone :], groups.counts[groups.alone :]
    rows = x.index_select(1, members.clamp(min=0).flatten()).to(wide)
    rows = rows.unflatten(1, members.shape) * (members >= 0)[None, :, :, None]
    means = rows.sum(2) / counts[None, :, None]
    return torch.cat([single, means.to(x.dtype)], dim=1)


def _groups(
    q: Tensor, region: str, halo: int, query_pool: int, key_pool: int, lip_weight: float
) -> tuple[Grouping, Grouping]:
    """How queries and keys are pooled."""
    tokens = q.shape[1]
    return (
        grouping_on(q.device, region, tokens, halo, query_pool, 1.0),
        grouping_on(q.device, region, tokens, halo, key_pool, lip_weight),
    )


@torch.library.custom_op(
    "lsync::lip_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, int heads, str region, int halo, int query_pool, "
    "int key_pool, float lip_weight, float? scale=None) -> Tensor",
)
def lip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    region: str,
    halo: int,
    query_pool: int,
    key_pool: int,
    lip_weight: float,
    scale: float | None = None,
) -> Tensor:
    """Attention within pictures, full in the mouth region and pooled elsewhere.

    Args:
        q, k, v: ``(n, tokens, heads*head_dim)``, tokens of a square picture row by row; float16,
            bfloat16 or float32. Slices of a fused projection are read in place.
        heads: attention heads.
        region: the mouth, see `lip_tables`; its side is a multiple of the picture's.
        halo: tokens around the region that attend in full too.
        query_pool, key_pool: side in tokens of the cells that are pooled outside; 1 pools nothing.
        lip_weight: how much more than others the region's keys count; 1 is no difference.
        scale: factor of the scores; ``head_dim ** -0.5`` when not given.

    Returns:
        ``(n, tokens, heads*head_dim)``, contiguous, of ``q``'s dtype.

    Raises:
        OptionError: shapes, dtypes or settings that do not fit.
    """
    _check(q, k, v, heads, halo, query_pool, key_pool, lip_weight, scale)
    settings = (heads, region, halo, query_pool, key_pool, lip_weight, scale)
    if runs_kernel(q):
        return lip_attention_kernel(q, k, v, *settings)
    return lip_attention_reference(q, k, v, *settings)


@lip_attention.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    region: str,
    halo: int,
    query_pool: int,
    key_pool: int,
    lip_weight: float,
    scale: float | None = None,
) -> Tensor:
    _check(q, k, v, heads, halo, query_pool, key_pool, lip_weight, scale)
    return q.new_empty(q.shape)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    halo: int,
    query_pool: int,
    key_pool: int,
    lip_weight: float,
    scale: float | None,
) -> None:
    if q.dim() != 3 or k.shape != q.shape or v.shape != q.shape:
        raise OptionError(
            "lip_attention: q, k and v must be (n, tokens, channels) alike, got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise OptionError(
            f"lip_attention: q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if heads < 1 or q.shape[2] % heads:
        raise OptionError(f"lip_attention: heads={heads} must divide {q.shape[2]} channels")
    if halo < 0 or min(query_pool, key_pool) < 1 or lip_weight <= 0:
        raise OptionError(
            f"lip_attention: halo={halo} must not be negative, query_pool={query_pool} and "
            f"key_pool={key_pool} at least 1, lip_weight={lip_weight} positive"
        )
    if scale is not None and scale <= 0:
        raise OptionError(f"lip_attention: scale={scale} must be positive")


SPEC = register(
    KernelSpec(
        name="lip_attention",
        summary="Attention within frames, full in the mouth region, pooled elsewhere; approximate "
        "by design, the error is against its own definition",
        op=lip_attention,
        kernel=lip_attention_kernel,
        reference=lip_attention_reference,
        source="Bolya et al. (2023), https://arxiv.org/abs/2210.09461",
        tolerances={
            torch.float32: Tolerance(1e-5, "the libraries' float32 kernels"),
            torch.float16: Tolerance(2e-3, "pooled rows, weights and result are rounded"),
            torch.bfloat16: Tolerance(1.6e-2, "pooled rows, weights and result are rounded"),
        },
    )
)

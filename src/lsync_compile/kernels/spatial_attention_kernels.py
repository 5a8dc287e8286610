# mypy: allow-untyped-defs, allow-incomplete-defs
"""FlashAttention for heads of a width that is no power of two, and for few keys.

The algorithm is FlashAttention's (Dao, 2023, https://arxiv.org/abs/2307.08691): scores stay on the
chip, a running maximum keeps their exponentials in range. Two things suit it to Stable Diffusion's
heads of 40, 80 and 160 channels. Library kernels pad them to 64, 128 and 256; here they are two
tiles, 32+16, 64+16 and 128+32, which saves a quarter of the products. And where padding is left
over (40 of 48), the values' padding is ones, so that the sum of the weights comes out of the
product with the values and costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lsync_compile.kernels.launch import Config, function, kernel, tl

MAX_DIM = 160
FEW_KEYS = 64


@function
def _update(
    q0,  # (ROWS, FIRST)
    q1,  # (ROWS, SECOND)
    k_at,  # pointers to keys of the first channel
    v_at,  # like k_at
    inside,  # (KEYS, 1), whether there is such a key
    maximum,  # (ROWS,)
    total,  # (ROWS,)
    out0,  # (ROWS, FIRST), float32
    out1,  # (ROWS, SECOND), float32
    scale,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take one tile of keys and values into account."""
    d0 = tl.arange(0, FIRST)[None, :]
    d1 = FIRST + tl.arange(0, SECOND)[None, :]
    if MASKED:
        k0 = tl.load(k_at + d0, inside & (d0 < DIM), 0.0)
        k1 = tl.load(k_at + d1, inside & (d1 < DIM), 0.0)
        v0 = tl.load(v_at + d0, inside & (d0 < DIM), 0.0)
        v1 = tl.load(v_at + d1, inside & (d1 < DIM), 1.0)
    else:
        k0 = tl.load(k_at + d0)
        k1 = tl.load(k_at + d1, d1 < DIM, 0.0)
        v0 = tl.load(v_at + d0)
        v1 = tl.load(v_at + d1, d1 < DIM, 1.0)
    scores = tl.dot(q0, tl.trans(k0))
    scores = tl.dot(q1, tl.trans(k1), scores)
    if MASKED:
        scores = tl.where(tl.trans(inside), scores, float("-inf"))
    new = tl.maximum(maximum, tl.max(scores, 1))
    weights = tl.exp2(scores * scale - (new * scale)[:, None])
    old = tl.exp2((maximum - new) * scale)
    if DIM == FIRST + SECOND:
        total = total * old + tl.sum(weights, 1)
    weights = weights.to(v0.dtype)
    out0 = tl.dot(weights, v0, out0 * old[:, None])
    out1 = tl.dot(weights, v1, out1 * old[:, None])
    return new, total, out0, out1


def _fits(config: Config, arguments: Mapping[str, Any]) -> bool:
    """One tile for few keys; otherwise what registers hold."""
    few = arguments["keys"] <= FEW_KEYS
    if few or arguments["DIM"] > 64:
        return config.blocks["KEYS"] == 64 and config.stages == (1 if few else 2)
    return config.stages > 1


@kernel(
    [
        Config({"ROWS": 128, "KEYS": 64}, warps=8, stages=1),
        Config({"ROWS": 64, "KEYS": 64}, warps=4, stages=1),
        Config({"ROWS": 128, "KEYS": 64}, warps=8, stages=2),
        Config({"ROWS": 128, "KEYS": 64}, warps=4, stages=3),
        Config({"ROWS": 128, "KEYS": 128}, warps=8, stages=2),
    ],
    key=("tokens", "keys", "stride_qs", "stride_ks", "HEADS", "DIM"),
    fits=_fits,
)
def _spatial_attention(
    q_ptr,  # (batch, tokens, HEADS, DIM); heads and their channels lie together
    k_ptr,  # (batch, keys, HEADS, DIM), likewise
    v_ptr,  # like k
    out_ptr,  # like q, contiguous
    tokens,
    keys,
    scale,  # of the scores, times the logarithm of e to base 2
    stride_qb,
    stride_qs,
    stride_kb,
    stride_ks,
    stride_vb,
    stride_vs,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS * DIM
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    key = tl.arange(0, KEYS)[:, None]
    d0 = tl.arange(0, FIRST)[None, :]
    d1 = FIRST + tl.arange(0, SECOND)[None, :]

    q_at = q_ptr + batch * stride_qb + head + row * stride_qs
    k_at = k_ptr + batch * stride_kb + head + key * stride_ks
    v_at = v_ptr + batch * stride_vb + head + key * stride_vs
    q0 = tl.load(q_at + d0, (row < tokens) & (d0 < DIM), 0.0)
    q1 = tl.load(q_at + d1, (row < tokens) & (d1 < DIM), 0.0)

    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out0 = tl.zeros((ROWS, FIRST), tl.float32)
    out1 = tl.zeros((ROWS, SECOND), tl.float32)
    whole = keys // KEYS * KEYS
    for _ in range(0, whole, KEYS):
        maximum, total, out0, out1 = _update(
            q0, q1, k_at, v_at, key < KEYS, maximum, total, out0, out1, scale,
            DIM, FIRST, SECOND, False,
        )  # fmt: skip
        k_at += KEYS * stride_ks
        v_at += KEYS * stride_vs
    if whole < keys:
        maximum, total, out0, out1 = _update(
            q0, q1, k_at, v_at, whole + key < keys, maximum, total, out0, out1, scale,
            DIM, FIRST, SECOND, True,
        )  # fmt: skip
    if DIM < FIRST + SECOND:  # the first channel of ones has gathered the weights
        total = tl.sum(tl.where(d1 == DIM, out1, 0.0), 1)

    out_at = out_ptr + batch * tokens * (HEADS * DIM) + head + row * (HEADS * DIM)
    out0 = out0 / total[:, None]
    out1 = out1 / total[:, None]
    tl.store(out_at + d0, out0.to(out_ptr.dtype.element_ty), (row < tokens) & (d0 < DIM))
    tl.store(out_at + d1, out1.to(out_ptr.dtype.element_ty), (row < tokens) & (d1 < DIM))


def tiles(dim: int) -> tuple[int, int]:
    """Channels of a head as two tiles, powers of two of at least 16, the larger first.

    >>> tiles(40), tiles(80), tiles(160), tiles(64)
    ((32, 16), (64, 16), (128, 32), (32, 32))
    """
    first = max(16, 1 << ((dim - 1).bit_length() - 1))
    rest = max(16, dim - first)
    return first, 1 << (rest - 1).bit_length()


def takes(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> bool:
    """Whether `flash_attention` can be tried on ``(N, heads, L, head_dim)`` tensors.

    In half precision, and with many keys only for narrow heads, which library kernels pad the most.
    """
    dim = q.shape[3]
    half = q.dtype in (torch.float16, torch.bfloat16)
    together = all(x.stride(3) == 1 and x.stride(1) == dim for x in (q, k, v))
    positive = scale is None or scale > 0  # a negative one turns maxima into minima
    suits = dim < 64 or (k.shape[2] <= FEW_KEYS and dim <= MAX_DIM)
    fits = dim >= 16 and dim % 8 == 0 and q.shape[0] * q.shape[1] < 2**16  # a grid's second size
    return half and together and positive and suits and fits


def flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attend, on tensors that `takes` accepts.

    Args:
        q: ``(N, heads, L, head_dim)``, a view of ``(N, L, heads*head_dim)``.
        k, v: ``(N, heads, S, head_dim)``, likewise.
        scale: factor of the scores; ``head_dim ** -0.5`` when not given.

    Returns:
        ``(N, heads, L, head_dim)``, a view of ``(N, L, heads*head_dim)``, contiguous.
    """
    n, heads, tokens, dim = q.shape
    out = torch.empty((n, tokens, heads, dim), dtype=q.dtype, device=q.device)
    first, second = tiles(dim)
    _spatial_attention.launch(
        lambda blocks: (-(-tokens // blocks["ROWS"]), n * heads),
        q, k, v, out, tokens, k.shape[2],
        (dim**-0.5 if scale is None else scale) * 1.4426950408889634,
        q.stride(0), q.stride(2), k.stride(0), k.stride(2), v.stride(0), v.stride(2),
        HEADS=heads, DIM=dim, FIRST=first, SECOND=second,
    )  # fmt: skip
    return out.transpose(1, 2)

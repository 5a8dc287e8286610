# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention for heads wider than 256, as two matrix products with a softmax kernel between.

The middle of Stable Diffusion's VAE attends over 4,096 tokens with one head of 512 channels. The
flash kernels of the libraries end at 256, and the one that is left to torch spills. A head that
wide does so much arithmetic for each score that writing the scores to memory and reading them
again costs less: 10 bytes for 2,048 operations. Scores are float32, a few pictures' at a time. The
weights are ``exp(score - maximum)``, between 0 and 1, and the sums of their rows divide the result
in float32, so half precision loses no more than in a flash kernel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lsync_compile.kernels.launch import Config, kernel, tl

NARROWEST = 256  # channels of a head: up to here flash kernels are better
MOST_KEYS = 16384  # a row of scores is held by one program
SCORES_AT_A_TIME = 2**26  # 256 MiB


def _fits(config: Config, arguments: Mapping[str, Any]) -> bool:
    """Few values a thread, so that none is spilled."""
    return bool(arguments["COLUMNS"] <= 64 * 32 * config.warps or config.warps == 16)


@kernel(
    [Config({}, warps=4), Config({}, warps=8), Config({}, warps=16)],
    key=("columns",),
    fits=_fits,
)
def _softmax_weights(
    scores_ptr,  # (rows, columns) float32, contiguous
    weights_ptr,  # (rows, columns), contiguous
    sums_ptr,  # (rows,) float32
    columns,
    factor,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    scores = tl.load(scores_ptr + row * columns + column, inside, float("-inf")) * factor
    weights = tl.exp2(scores - tl.max(scores, 0))
    rounded = weights.to(weights_ptr.dtype.element_ty)
    tl.store(weights_ptr + row * columns + column, rounded, inside)
    tl.store(sums_ptr + row, tl.sum(rounded.to(tl.float32), 0))


def takes(q: Tensor, k: Tensor) -> bool:
    """Whether `attend` is for these ``(N, heads, L, head_dim)`` tensors."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    return half and q.shape[3] > NARROWEST and 0 < k.shape[2] <= MOST_KEYS


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Attention on ``(N, heads, L, head_dim)``; ``takes`` must hold.

    Returns:
        ``(N, heads, L, head_dim)`` in the memory layout of ``(N, L, heads, head_dim)``.
    """
    batch, heads, length, width = q.shape
    factor = (width**-0.5 if scale is None else scale) * math.log2(math.e)
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))  # rows of tokens
    out = torch.empty((batch, length, heads, width), dtype=q.dtype, device=q.device)
    step = max(1, SCORES_AT_A_TIME // (length * k.shape[2]))
    for head in range(heads):
        for first in range(0, batch, step):
            part = slice(first, first + step)
            out[part, :, head] = _one_head(
                queries[part, :, head], keys[part, :, head], values[part, :, head], factor
            )
    return out.transpose(1, 2)


def _one_head(q: Tensor, k: Tensor, v: Tensor, factor: float) -> Tensor:
    """``q (n, L, C)``, ``k, v (n, S, C)`` -> ``(n, L, C)`` float32."""
    rows, columns = q.shape[0] * q.shape[1], k.shape[1]
    scores = _product(q, k.transpose(1, 2))
    weights = torch.empty_like(scores, dtype=q.dtype)
    sums = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    _softmax_weights.launch(
        lambda blocks: (rows,),
        scores, weights, sums, columns, factor,
        COLUMNS=max(16, 1 << (columns - 1).bit_length()),
    )  # fmt: skip
    return _product(weights, v) / sums[:, :, None]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of half precision in float32."""
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())  # CPUs have no product with another result dtype

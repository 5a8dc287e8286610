# mypy: allow-untyped-defs, allow-incomplete-defs
"""FlashAttention fed by Hopper's copy engine, for narrow heads and many keys.

The algorithm is FlashAttention's (Dao, 2023, https://arxiv.org/abs/2307.08691). The copy engine
reads heads out of rows of tokens, slices of a fused projection included, and fills a head of 40
channels up to 64 with zeros; addresses and masks cost no registers. Not among what
`lsync_compile.kernels.spatial_attention` chooses from until it has been timed:
``benchmarks/kernels.py`` times each of `WAYS` beside it.

Triton 3.6 to 3.9 do not specialise warps here: with ``warp_specialize`` four warps fail to compile
for Hopper and eight compile to the same code as without. Tiles are powers of two, so that 48
channels are two tiles (`spatial_attention_kernels`) or 64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lsync_compile.kernels.launch import Config, TensorDescriptor, kernel, tl

PADDED = 64
BLOCKS = ((128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 3), (128, 64, 4, 2))


def _attention_stream(
    q,  # descriptor of (batch, tokens, HEADS, dim), blocks (1, ROWS, 1, PADDED)
    k,  # of (batch, keys, HEADS, dim), blocks (1, KEYS, 1, PADDED)
    v,  # like k
    out,  # like q
    keys,  # a multiple of KEYS
    scale,  # of the scores, times the logarithm of e to base 2; positive
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    batch, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    first = tl.program_id(0) * ROWS
    queries = q.load([batch, first, head, 0]).reshape(ROWS, PADDED)
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, PADDED), tl.float32)
    for key in range(0, keys, KEYS):
        tile = k.load([batch, key, head, 0]).reshape(KEYS, PADDED)
        scores = tl.dot(queries, tile.T)
        new = tl.maximum(maximum, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new[:, None])
        old = tl.exp2(maximum - new)
        total = total * old + tl.sum(weights, 1)
        acc = acc * old[:, None]
        tile = v.load([batch, key, head, 0]).reshape(KEYS, PADDED)
        acc = tl.dot(weights.to(tile.dtype), tile, acc)
        maximum = new
    result = (acc / total[:, None]).to(out.dtype)
    out.store([batch, first, head, 0], result.reshape(1, ROWS, 1, PADDED))


WAYS = {
    f"stream {rows}x{keys}, {warps} warps, {stages} stages": kernel(
        [Config({"ROWS": rows, "KEYS": keys}, warps, stages)]
    )(_attention_stream)
    for rows, keys, warps, stages in BLOCKS
}
"""The same kernel with tiles of its own in each: a descriptor is made for one size of tile."""


def attend(way: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention of `takes`'s tensors ``(N, heads, L, head_dim)``, answered in that layout."""
    n, heads, tokens, dim = q.shape
    chosen = WAYS[way]
    blocks = chosen.configs[0].blocks
    out = q.new_empty(n, tokens, heads, dim)
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    sizes = [blocks["ROWS"], blocks["KEYS"], blocks["KEYS"], blocks["ROWS"]]
    chosen.launch(
        lambda blocks: (-(-tokens // blocks["ROWS"]), n * heads),
        *(
            TensorDescriptor(x, [*x.shape], [*x.stride()], [1, size, 1, PADDED])
            for x, size in zip((*rows, out), sizes, strict=True)
        ),
        k.shape[2], (dim**-0.5 if scale is None else scale) / math.log(2),
        HEADS=heads,
        PADDED=PADDED,
    )  # fmt: skip
    return out.transpose(1, 2)


def takes(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> bool:
    """Half precision, heads of 8 to 64 channels apart by 16 bytes, keys that fill all tiles."""
    fits = q.dtype in (torch.float16, torch.bfloat16) and TensorDescriptor is not None
    fits = fits and q.shape[3] % 8 == 0 and q.shape[3] <= PADDED and k.shape[2] % 128 == 0
    fits = fits and (scale is None or scale > 0)
    if q.is_cuda:
        fits = fits and torch.cuda.get_device_capability(q.device) == (9, 0)
    steps = [step for x in (q, k, v) for step in x.stride()[:3]]
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(3) == 1 for x in (q, k, v))
    return fits and aligned and all(step % 8 == 0 for step in steps)

# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention along the frames of a video, straight from the layout of a frame's tokens.

``out[b, i, s, h] = sum_j softmax_j(scale * <q[b, i, s, h], k[b, j, s, h]>) v[b, j, s, h]`` with
i, j over the frames of a chunk, s over its token positions and h over the heads: the attention of
AnimateDiff's motion modules (Guo et al., 2023, https://arxiv.org/abs/2307.04725), exactly. The
tensors stay ``(batch*frames, tokens, heads*head_dim)``, where elsewhere two rearranges to
``(batch*tokens, frames, heads*head_dim)`` and back surround it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lsync_compile.errors import OptionError
from lsync_compile.kernels.launch import Config, kernel, runs_kernel, tl
from lsync_compile.kernels.spec import KernelSpec, Tolerance, register

MAX_FRAMES = 32


def _fits(config: Config, arguments: Mapping[str, Any]) -> bool:
    """Tiles no more than half empty, and small enough to stay in registers."""
    chunk, items = config.blocks["CHUNK"], config.blocks["ITEMS"]
    size = items * arguments["PADDED"] * chunk * arguments["q_ptr"].element_size()
    return bool(chunk < max(2 * arguments["DIM"], 17) and size <= 16384)


@kernel(
    [
        Config({"ITEMS": 8, "CHUNK": 64}),
        Config({"ITEMS": 8, "CHUNK": 16}),
        Config({"ITEMS": 4, "CHUNK": 64}),
    ],
    key=("tokens", "stride_qs", "FRAMES", "HEADS", "DIM"),
    fits=_fits,
)
def _temporal_attention(
    q_ptr,  # (batch, FRAMES, tokens, HEADS, DIM); heads and their channels lie together
    k_ptr,  # like q
    v_ptr,  # like q
    out_ptr,  # like q, contiguous
    tokens,
    scale,
    stride_qf,
    stride_qs,
    stride_kf,
    stride_ks,
    stride_vf,
    stride_vs,
    FRAMES: tl.constexpr,
    PADDED: tl.constexpr,  # FRAMES rounded up to what tensor cores take
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    ITEMS: tl.constexpr,  # pairs of a token and a head in one program
    CHUNK: tl.constexpr,  # channels of a head in one tile
):
    blocks = tl.cdiv(tokens * HEADS, ITEMS)
    batch = (tl.program_id(0) // blocks).to(tl.int64) * FRAMES
    item = tl.program_id(0) % blocks * ITEMS + tl.arange(0, ITEMS)[:, None, None]
    token, head = item // HEADS, item % HEADS
    frame = tl.arange(0, PADDED)[None, :, None]
    d = tl.arange(0, CHUNK)[None, None, :]
    inside = (item < tokens * HEADS) & (frame < FRAMES)

    q_at = q_ptr + batch * stride_qf + (frame * stride_qf + token * stride_qs + head * DIM + d)
    k_at = k_ptr + batch * stride_kf + (frame * stride_kf + token * stride_ks + head * DIM + d)
    v_at = v_ptr + batch * stride_vf + (frame * stride_vf + token * stride_vs + head * DIM + d)
    stride_f = tokens * HEADS * DIM
    out_at = out_ptr + batch * stride_f + (frame * stride_f + item * DIM + d)

    scores = tl.zeros((ITEMS, PADDED, PADDED), tl.float32)
    for c in tl.static_range(0, DIM, CHUNK):
        q = tl.load(q_at + c, inside & (d + c < DIM), 0.0)
        k = tl.load(k_at + c, inside & (d + c < DIM), 0.0)
        scores = tl.dot(q, tl.permute(k, 0, 2, 1), scores, input_precision=PRECISION)
    v = tl.load(v_at, inside & (d < DIM), 0.0)  # before the softmax, to hide the wait

    key_frame = tl.arange(0, PADDED)[None, None, :]
    scores = tl.where(key_frame < FRAMES, scores * (scale * 1.4426950408889634), float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 2)[:, :, None])
    total = tl.sum(weights, 2)[:, :, None]
    weights = weights.to(v_ptr.dtype.element_ty)
    for c in tl.static_range(0, DIM, CHUNK):
        if c > 0:
            v = tl.load(v_at + c, inside & (d + c < DIM), 0.0)
        out = tl.dot(weights, v, input_precision=PRECISION) / total
        tl.store(out_at + c, out.to(out_ptr.dtype.element_ty), inside & (d + c < DIM))


def temporal_attention_kernel(
    q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int, scale: float | None = None
) -> Tensor:
    """Launch the kernel on arguments that `temporal_attention` accepts."""
    total, tokens, channels = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    batch = total // frames
    _temporal_attention.launch(
        lambda blocks: (batch * -(-tokens * heads // blocks["ITEMS"]),),
        q, k, v, out, tokens, (channels // heads) ** -0.5 if scale is None else scale,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        FRAMES=frames,
        PADDED=16 if frames <= 16 else 32,
        HEADS=heads,
        DIM=channels // heads,
        # Tensor cores would round float32 operands to 10 bits otherwise.
        PRECISION="tf32x3" if q.dtype == torch.float32 else "ieee",
    )  # fmt: skip
    return out


def temporal_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int, scale: float | None = None
) -> Tensor:
    """The same by rearranging to ``(batch*tokens, heads, frames, head_dim)`` and back."""
    total, tokens, channels = q.shape

    def split(x: Tensor) -> Tensor:
        x = x.reshape(-1, frames, tokens, heads, channels // heads)
        return x.permute(0, 2, 3, 1, 4).flatten(0, 1)

    out = F.scaled_dot_product_attention(split(q), split(k), split(v), scale=scale)
    out = out.reshape(-1, tokens, heads, frames, channels // heads).permute(0, 3, 1, 2, 4)
    return out.reshape(total, tokens, channels)


@torch.library.custom_op(
    "lsync::temporal_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, int frames, int heads, float? scale=None) -> Tensor",
)
def temporal_attention(
    q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int, scale: float | None = None
) -> Tensor:
    """Attention of every token position and head over the frames of its chunk.

    Args:
        q, k, v: ``(batch*frames, tokens, heads*head_dim)``, frames of a chunk one after another;
            float16, bfloat16 or float32. Slices of one fused projection are read in place, as is
            any view whose channels lie together.
        frames: frames of a chunk, 1 to 32.
        heads: attention heads.
        scale: factor of the scores; ``head_dim ** -0.5`` when not given.

    Returns:
        ``(batch*frames, tokens, heads*head_dim)``, contiguous, of ``q``'s dtype.

    Raises:
        OptionError: shapes or dtypes that differ, or that frames and heads do not divide.
    """
    _check(q, k, v, frames, heads)
    if runs_kernel(q):
        return temporal_attention_kernel(q, k, v, frames, heads, scale)
    return temporal_attention_reference(q, k, v, frames, heads, scale).contiguous()


@temporal_attention.register_fake
def _fake(
    q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int, scale: float | None = None
) -> Tensor:
    _check(q, k, v, frames, heads)
    return q.new_empty(q.shape)


def _check(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> None:
    if q.dim() != 3 or k.shape != q.shape or v.shape != q.shape:
        raise OptionError(
            "temporal_attention: q, k and v must all be (batch*frames, tokens, channels), got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise OptionError(
            f"temporal_attention: q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not 1 <= frames <= MAX_FRAMES or q.shape[0] % frames:
        raise OptionError(
            f"temporal_attention: frames={frames} must be 1 to {MAX_FRAMES} and divide the "
            f"{q.shape[0]} rows of q"
        )
    if heads < 1 or q.shape[2] % heads:
        raise OptionError(f"temporal_attention: heads={heads} must divide {q.shape[2]} channels")


SPEC = register(
    KernelSpec(
        name="temporal_attention",
        summary="Attention over the frames of a chunk, in the `(b f) s c` layout",
        op=temporal_attention,
        kernel=temporal_attention_kernel,
        reference=temporal_attention_reference,
        source="AnimateDiff (Guo et al., 2023), https://arxiv.org/abs/2307.04725",
        tolerances={
            torch.float32: Tolerance(1e-5, "three tf32 products stand for one float32 product"),
            torch.float16: Tolerance(1e-3, "weights and result are rounded to 11 bits"),
            torch.bfloat16: Tolerance(8e-3, "weights and result are rounded to 8 bits"),
        },
    )
)

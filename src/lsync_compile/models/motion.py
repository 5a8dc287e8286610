"""Attention across frames: every pixel position attends to itself at other times.

The temporal transformer of AnimateDiff (Guo et al., 2023), https://arxiv.org/abs/2307.04725.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from lsync_compile.errors import OptionError

from .attention import Attention
from .resnet import frames_to_batch, zero_


class PositionalEncoding(nn.Module):
    """Add sinusoids of the frame number (Vaswani et al., 2017)."""

    pe: Tensor

    def __init__(self, dim: int, max_len: int) -> None:
        super().__init__()
        position = torch.arange(max_len)[:, None]
        frequency = torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
        angle = position * frequency  # (max_len, dim / 2)
        # Sine and cosine alternate along the channels. Checkpoints store the table.
        self.register_buffer("pe", torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[None])

    def forward(self, x: Tensor) -> Tensor:
        """``(N, F, dim)`` -> ``(N, F, dim)`` for at most ``max_len`` frames."""
        return x + self.pe[:, : x.shape[1]]


class TemporalAttention(Attention):
    """Self-attention along the frames, optionally told the frame numbers."""

    def __init__(self, dim: int, *, heads: int, inner_dim: int, max_len: int | None) -> None:
        super().__init__(dim, heads=heads, inner_dim=inner_dim)
        self.pos_encoder = None if max_len is None else PositionalEncoding(dim, max_len)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``(N, F, dim)`` -> ``(N, F, dim)``."""
        return super().forward(x if self.pos_encoder is None else self.pos_encoder(x), context)


class TemporalTransformerBlock(nn.Module):
    """One or more temporal self-attentions and a feed-forward, each residual."""

    def __init__(self, dim: int, *, heads: int, attentions: int, max_len: int | None) -> None:
        super().__init__()
        self.attention_blocks = nn.ModuleList(
            TemporalAttention(dim, heads=heads, inner_dim=dim, max_len=max_len)
            for _ in range(attentions)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(attentions))
        self.ff = FeedForward(dim, activation_fn="geglu")
        self.ff_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, F, dim)`` -> ``(N, F, dim)``."""
        for attention, norm in zip(self.attention_blocks, self.norms, strict=True):
            x = attention(norm(x)) + x
        out: Tensor = self.ff(self.ff_norm(x)) + x
        return out


class TemporalTransformer3DModel(nn.Module):
    """A transformer over the frames of each pixel position, added to its input."""

    def __init__(
        self,
        channels: int,
        *,
        inner_dim: int,
        heads: int,
        groups: int,
        layers: int,
        attentions: int,
        max_len: int | None,
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner_dim)
        self.transformer_blocks = nn.ModuleList(
            TemporalTransformerBlock(inner_dim, heads=heads, attentions=attentions, max_len=max_len)
            for _ in range(layers)
        )
        self.proj_out = nn.Linear(inner_dim, channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, F, H, W)`` -> ``(B, C, F, H, W)``."""
        batch, channels, frames, height, width = x.shape
        h = self.norm(frames_to_batch(x))  # one frame at a time, unlike the residual blocks' norms
        h = h.view(batch, frames, channels, height, width).permute(0, 3, 4, 1, 2)  # (B, H, W, F, C)
        h = self.proj_in(h.flatten(0, 2))  # (B*H*W, F, inner)
        for block in self.transformer_blocks:
            h = block(h)
        h = self.proj_out(h).view(batch, height, width, frames, channels)
        out: Tensor = h.permute(0, 4, 3, 1, 2) + x
        return out


class MotionModule(nn.Module):
    """LatentSync's "Vanilla" motion module.

    Args:
        channels: channels of the video.
        num_attention_heads: heads of each attention.
        num_transformer_block: number of transformer blocks.
        attention_block_types: one ``"Temporal_Self"`` for each attention of a block.
        temporal_position_encoding: whether attention is told the frame numbers.
        temporal_position_encoding_max_len: most frames in a chunk when it is.
        temporal_attention_dim_div: divides the width of the transformer.
        zero_initialize: start as the identity (before training).
        norm_num_groups: groups of the norm at the entrance.

    Raises:
        OptionError: an attention type other than ``"Temporal_Self"``.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_attention_heads: int = 8,
        num_transformer_block: int = 2,
        attention_block_types: Sequence[str] = ("Temporal_Self", "Temporal_Self"),
        temporal_position_encoding: bool = False,
        temporal_position_encoding_max_len: int = 24,
        temporal_attention_dim_div: int = 1,
        zero_initialize: bool = True,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        for kind in attention_block_types:
            if kind != "Temporal_Self":
                raise OptionError(
                    f"motion_module_kwargs.attention_block_types: {kind!r} is not supported; "
                    "use 'Temporal_Self'"
                )
        head_dim = channels // num_attention_heads // temporal_attention_dim_div
        self.temporal_transformer = TemporalTransformer3DModel(
            channels,
            inner_dim=num_attention_heads * head_dim,
            heads=num_attention_heads,
            groups=norm_num_groups,
            layers=num_transformer_block,
            attentions=len(attention_block_types),
            max_len=temporal_position_encoding_max_len if temporal_position_encoding else None,
        )
        if zero_initialize:
            zero_(self.temporal_transformer.proj_out)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, F, H, W)`` -> ``(B, C, F, H, W)``."""
        out: Tensor = self.temporal_transformer(x)
        return out


def motion_max_frames(kwargs: dict[str, Any]) -> int | None:
    """Most frames that motion modules with these arguments can take; none if unlimited."""
    if not kwargs.get("temporal_position_encoding", False):
        return None
    return int(kwargs.get("temporal_position_encoding_max_len", 24))

"""Attention within a frame: pixels to pixels, and pixels to the sound around the frame."""

from __future__ import annotations

import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from .resnet import batch_to_frames, frames_to_batch


class Attention(nn.Module):
    """Multi-head attention without biases on queries, keys and values (Vaswani et al., 2017).

    Args:
        dim: channels of the queries and of the result; a multiple of ``heads``.
        context_dim: channels of the keys' and values' source; ``dim`` for self-attention.
        heads: number of heads.
        inner_dim: width of all heads together; ``dim`` when not given.
    """

    def __init__(
        self, dim: int, *, heads: int, context_dim: int | None = None, inner_dim: int | None = None
    ) -> None:
        super().__init__()
        inner = dim if inner_dim is None else inner_dim
        source = dim if context_dim is None else context_dim
        self.heads = heads
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(source, inner, bias=False)
        self.to_v = nn.Linear(source, inner, bias=False)
        # A list because checkpoints name the output projection `to_out.0`.
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``x (N, L, dim)``, ``context (N, S, context_dim)`` or none -> ``(N, L, dim)``."""
        source = x if context is None else context
        query = self._split(self.to_q(x))
        key = self._split(self.to_k(source))
        value = self._split(self.to_v(source))
        out = F.scaled_dot_product_attention(query, key, value)  # (N, heads, L, head_dim)
        result: Tensor = self.to_out[0](out.transpose(1, 2).flatten(2))
        return result

    def _split(self, x: Tensor) -> Tensor:
        """``(N, L, heads*head_dim)`` -> ``(N, heads, L, head_dim)``."""
        return x.reshape(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)


class TransformerBlock(nn.Module):
    """Self-attention, attention to sound, feed-forward; each on a normed input and residual."""

    def __init__(self, dim: int, *, heads: int, audio_dim: int | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads=heads)
        if audio_dim is None:
            self.norm2 = self.attn2 = None
        else:
            self.norm2 = nn.LayerNorm(dim)
            self.attn2 = Attention(dim, heads=heads, context_dim=audio_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, activation_fn="geglu")

    def forward(self, x: Tensor, audio: Tensor | None) -> Tensor:
        """``x (N, L, C)``, ``audio (N, S, D)`` or none -> ``(N, L, C)``."""
        x = self.attn1(self.norm1(x)) + x
        if self.attn2 is not None and self.norm2 is not None and audio is not None:
            x = self.attn2(self.norm2(x), audio) + x
        out: Tensor = self.ff(self.norm3(x)) + x
        return out


class Transformer3DModel(nn.Module):
    """A transformer over the pixels of each frame, added to its input.

    Args:
        channels: channels of the video.
        heads: attention heads.
        groups: groups of the norm at the entrance.
        audio_dim: channels of the sound features; none leaves out the attention to sound.
    """

    def __init__(self, channels: int, *, heads: int, groups: int, audio_dim: int | None) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, kernel_size=1)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, heads=heads, audio_dim=audio_dim)]
        )
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor, audio: Tensor | None) -> Tensor:
        """``x (B, C, F, H, W)``, ``audio (B*F, S, D)`` or none -> ``(B, C, F, H, W)``."""
        residual = frames_to_batch(x)  # (B*F, C, H, W)
        h = self.proj_in(self.norm(residual))
        h = h.flatten(2).transpose(1, 2)  # (B*F, H*W, C)
        for block in self.transformer_blocks:
            h = block(h, audio)
        h = h.transpose(1, 2).contiguous().view(residual.shape)  # (B*F, C, H, W)
        h = self.proj_out(h)
        return batch_to_frames(h + residual, x.shape[2])

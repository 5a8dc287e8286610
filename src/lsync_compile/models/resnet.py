"""Convolutional building blocks of the video UNet.

All activations between modules are videos ``(B, C, F, H, W)``. Convolutions see each frame alone,
``(B*F, C, H, W)``; the group norms of the residual blocks see the whole video, so that one set of
statistics is shared by all frames of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def frames_to_batch(x: Tensor) -> Tensor:
    """``(B, C, F, H, W)`` -> ``(B*F, C, H, W)``."""
    return x.transpose(1, 2).flatten(0, 1)


def batch_to_frames(x: Tensor, frames: int) -> Tensor:
    """``(B*F, C, H, W)`` -> ``(B, C, F, H, W)``, a view."""
    return x.view(-1, frames, *x.shape[1:]).transpose(1, 2)


class FrameConv2d(nn.Conv2d):
    """A 2-D convolution applied to every frame of a video ``(B, C, F, H, W)``."""

    def forward(self, x: Tensor) -> Tensor:
        return batch_to_frames(super().forward(frames_to_batch(x)), x.shape[2])


class Downsample3D(nn.Module):
    """Halve height and width with a strided 3x3 convolution; odd sizes round up."""

    def __init__(self, channels: int, *, padding: int = 1) -> None:
        super().__init__()
        self.conv = FrameConv2d(channels, channels, kernel_size=3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, F, H, W)`` -> ``(B, C, F, ceil(H/2), ceil(W/2))``."""
        out: Tensor = self.conv(x)
        return out


class Upsample3D(nn.Module):
    """Nearest-neighbour upsampling to a given size, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = FrameConv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """``(B, C, F, h, w)`` -> ``(B, C, F, *size)``.

        ``size`` is that of the skip connection which the result joins: twice ``(h, w)``, or one
        less where the way down rounded up.
        """
        # Per frame rather than as one volume: the 2-D kernel keeps half precision.
        y = F.interpolate(frames_to_batch(x), size=size, mode="nearest")
        out: Tensor = self.conv(batch_to_frames(y, x.shape[2]))
        return out


class ResnetBlock3D(nn.Module):
    """Two 3x3 convolutions with group norm and SiLU, the time embedding added between them."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        temb_channels: int,
        groups: int,
        eps: float,
        output_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.output_scale = output_scale
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = FrameConv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = FrameConv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.nonlinearity = nn.SiLU()
        self.conv_shortcut = (
            FrameConv2d(in_channels, out_channels, kernel_size=1)
            if in_channels != out_channels
            else None
        )

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """``x (B, C_in, F, H, W)``, ``temb (B, T)`` -> ``(B, C_out, F, H, W)``."""
        h = self.conv1(self.nonlinearity(self.norm1(x)))
        h = h + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None, None]
        h = self.conv2(self.nonlinearity(self.norm2(h)))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        out: Tensor = shortcut + h
        return out if self.output_scale == 1 else out / self.output_scale


def zero_(module: nn.Module) -> None:
    """Set all parameters of ``module`` to zero, so that a residual branch starts as nothing."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()

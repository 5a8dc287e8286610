"""The stages of the video UNet: down, middle and up, each at one resolution.

A layer of a stage is a residual block, then (in stages with attention) a transformer over the
frame's pixels and the sound, then (where switched on) a motion module over the frames.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .attention import Transformer3DModel
from .motion import MotionModule
from .resnet import Downsample3D, ResnetBlock3D, Upsample3D


@dataclass(frozen=True)
class StageConfig:
    """What the layers of one stage have in common.

    ``heads`` is none for a stage without pixel attention, ``audio_dim`` for attention without
    sound, ``motion`` (keyword arguments of `MotionModule`) for a stage without motion modules.
    """

    temb_channels: int
    groups: int
    eps: float
    heads: int | None
    audio_dim: int | None
    motion: dict[str, Any] | None = field(default=None)

    def resnet(self, in_channels: int, out_channels: int, scale: float = 1.0) -> ResnetBlock3D:
        return ResnetBlock3D(
            in_channels,
            out_channels,
            temb_channels=self.temb_channels,
            groups=self.groups,
            eps=self.eps,
            output_scale=scale,
        )

    def attention(self, channels: int) -> Transformer3DModel:
        assert self.heads is not None
        return Transformer3DModel(
            channels, heads=self.heads, groups=self.groups, audio_dim=self.audio_dim
        )


class Stage(nn.Module):
    """``len(in_channels)`` layers of ``out_channels`` each; layer i takes ``in_channels[i]``."""

    def __init__(self, in_channels: list[int], out_channels: int, config: StageConfig) -> None:
        super().__init__()
        layers = len(in_channels)
        # Stages without attention have no such attribute: checkpoints and tools look for it.
        if config.heads is not None:
            self.attentions = nn.ModuleList(config.attention(out_channels) for _ in range(layers))
        self.resnets = nn.ModuleList(config.resnet(c, out_channels) for c in in_channels)
        self.motion_modules = nn.ModuleList(
            []
            if config.motion is None
            else [MotionModule(out_channels, **config.motion) for _ in range(layers)]
        )
        self.has_cross_attention = config.heads is not None

    def layer(self, index: int, x: Tensor, temb: Tensor, audio: Tensor | None) -> Tensor:
        """Run one layer: ``(B, C_in, F, H, W)`` -> ``(B, C_out, F, H, W)``."""
        x = self.resnets[index](x, temb)
        if self.has_cross_attention:
            x = self.attentions[index](x, audio)
        if len(self.motion_modules) > 0:
            x = self.motion_modules[index](x)
        return x


class DownStage(Stage):
    """Layers, then a downsampler in all stages but the last."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: StageConfig,
        *,
        layers: int,
        downsample: bool,
        padding: int,
    ) -> None:
        super().__init__([in_channels] + [out_channels] * (layers - 1), out_channels, config)
        self.downsamplers = (
            nn.ModuleList([Downsample3D(out_channels, padding=padding)]) if downsample else None
        )

    def forward(self, x: Tensor, temb: Tensor, audio: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Return the result and, in order, everything the way up joins again.

        ``x (B, C_in, F, H, W)``, ``temb (B, T)``, ``audio (B*F, S, D)`` or none.
        """
        skips = []
        for index in range(len(self.resnets)):
            x = self.layer(index, x, temb, audio)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class UpStage(Stage):
    """Layers that each join one skip connection, then an upsampler in all stages but the last.

    ``in_channels`` is what comes from below, ``skip_channels`` what each layer joins.
    """

    def __init__(
        self,
        in_channels: int,
        skip_channels: list[int],
        out_channels: int,
        config: StageConfig,
        *,
        upsample: bool,
    ) -> None:
        inputs = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        joined = [c + skip for c, skip in zip(inputs, skip_channels, strict=True)]
        super().__init__(joined, out_channels, config)
        self.upsamplers = nn.ModuleList([Upsample3D(out_channels)]) if upsample else None

    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        temb: Tensor,
        audio: Tensor | None,
        size: tuple[int, int] | None,
    ) -> Tensor:
        """``x (B, C, F, h, w)`` -> ``(B, C_out, F, *size)``.

        ``skips`` holds one tensor a layer, the one to join first at the end; ``size`` is the
        height and width of the next stage up, none for a stage without an upsampler.
        """
        for index, skip in enumerate(reversed(skips)):
            x = self.layer(index, torch.cat([x, skip], dim=1), temb, audio)
        if self.upsamplers is not None:
            x = self.upsamplers[0](x, size)
        return x


class MidStage(nn.Module):
    """Residual block, attention (and motion), residual block at the lowest resolution."""

    def __init__(self, channels: int, config: StageConfig, *, scale: float) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([config.attention(channels)])
        self.resnets = nn.ModuleList(config.resnet(channels, channels, scale) for _ in range(2))
        self.motion_modules = nn.ModuleList(
            [] if config.motion is None else [MotionModule(channels, **config.motion)]
        )
        self.has_cross_attention = True

    def forward(self, x: Tensor, temb: Tensor, audio: Tensor | None) -> Tensor:
        """``(B, C, F, H, W)`` -> ``(B, C, F, H, W)``."""
        x = self.resnets[0](x, temb)
        x = self.attentions[0](x, audio)
        if len(self.motion_modules) > 0:
            x = self.motion_modules[0](x)
        out: Tensor = self.resnets[1](x, temb)
        return out

"""LatentSync's denoising network: Stable Diffusion's UNet over videos, told by sound.

Checkpoint-compatible with the UNet of LatentSync 1.5 and 1.6 (Li et al., 2024,
https://arxiv.org/abs/2412.09262): the same state-dict names, shapes and results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from lsync_compile.errors import OptionError

from .blocks import DownStage, MidStage, StageConfig, UpStage
from .motion import motion_max_frames
from .resnet import FrameConv2d, zero_

_HAS_ATTENTION = {
    "CrossAttnDownBlock3D": True,
    "DownBlock3D": False,
    "CrossAttnUpBlock3D": True,
    "UpBlock3D": False,
}


@dataclass
class UNet3DConditionOutput(BaseOutput):
    """``sample``: the predicted noise ``(B, out_channels, F, H, W)``."""

    sample: Tensor


class UNet3DConditionModel(ModelMixin, ConfigMixin):
    """Predict the noise in the latents of a chunk of face frames.

    The configuration has the keys of LatentSync's YAML files (section ``model``). Those with a
    meaning of their own:

    Args:
        sample_size: height and width of the latents that the model was made for (a record only).
        in_channels: 13 = noisy latents 4, mask 1, masked-face latents 4, reference latents 4.
        down_block_types, up_block_types: from the outside in and from the inside out;
            ``CrossAttn...`` has attention.
        layers_per_block: layers of each stage on the way down; one more on the way up.
        attention_head_dim: the *number* of attention heads (as in Stable Diffusion 1), for all
            stages or one for each.
        add_audio_layer: attend to sound, with features of ``cross_attention_dim``.
        use_motion_module: temporal attention in the stages whose downsampling factor is in
            ``motion_module_resolutions`` (only on the way up with
            ``motion_module_decoder_only``), and in the middle with ``motion_module_mid_block``.
        motion_module_kwargs: arguments of `lsync_compile.models.motion.MotionModule`;
            ``norm_num_groups`` is the UNet's own if not among them.

    Raises:
        OptionError: a value that this architecture does not have.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        center_input_sample: bool = False,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: Sequence[str] = (
            "CrossAttnDownBlock3D",
            "CrossAttnDownBlock3D",
            "CrossAttnDownBlock3D",
            "DownBlock3D",
        ),
        mid_block_type: str = "UNetMidBlock3DCrossAttn",
        up_block_types: Sequence[str] = (
            "UpBlock3D",
            "CrossAttnUpBlock3D",
            "CrossAttnUpBlock3D",
            "CrossAttnUpBlock3D",
        ),
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int = 1280,
        attention_head_dim: int | Sequence[int] = 8,
        resnet_time_scale_shift: str = "default",
        use_motion_module: bool = False,
        motion_module_resolutions: Sequence[int] = (1, 2, 4, 8),
        motion_module_mid_block: bool = False,
        motion_module_decoder_only: bool = False,
        motion_module_type: str | None = None,
        motion_module_kwargs: dict[str, Any] | None = None,
        add_audio_layer: bool = False,
    ) -> None:
        super().__init__()
        widths = list(block_out_channels)
        levels = len(widths)
        _only("act_fn", act_fn, ("silu", "swish"))
        _only("mid_block_type", mid_block_type, ("UNetMidBlock3DCrossAttn",))
        _only("resnet_time_scale_shift", resnet_time_scale_shift, ("default",))
        if use_motion_module:
            _only("motion_module_type", motion_module_type, ("Vanilla",))
        heads = (
            [attention_head_dim] * levels
            if isinstance(attention_head_dim, int)
            else list(attention_head_dim)
        )
        for name, value in (
            ("down_block_types", down_block_types),
            ("up_block_types", up_block_types),
            ("attention_head_dim", heads),
        ):
            if len(value) != levels:
                raise OptionError(
                    f"{name}: {len(value)} values for the {levels} stages of block_out_channels"
                )
        for kind in (*down_block_types, *up_block_types):
            _only("block type", kind, tuple(_HAS_ATTENTION))

        motion = {"norm_num_groups": norm_num_groups, **(motion_module_kwargs or {})}
        self.max_frames = motion_max_frames(motion) if use_motion_module else None
        temb_channels = widths[0] * 4

        def stage(kind: str, level: int, with_motion: bool) -> StageConfig:
            return StageConfig(
                temb_channels=temb_channels,
                groups=norm_num_groups,
                eps=norm_eps,
                heads=heads[level] if _HAS_ATTENTION.get(kind, True) else None,
                audio_dim=cross_attention_dim if add_audio_layer else None,
                motion=motion if use_motion_module and with_motion else None,
            )

        self.conv_in = FrameConv2d(in_channels, widths[0], kernel_size=3, padding=1)
        self.time_proj = Timesteps(widths[0], flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(widths[0], temb_channels)

        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]  # channels of every skip connection, in the order they are made
        for level, kind in enumerate(down_block_types):
            last = level == levels - 1
            moves = 2**level in motion_module_resolutions and not motion_module_decoder_only
            self.down_blocks.append(
                DownStage(
                    widths[max(level - 1, 0)],
                    widths[level],
                    stage(kind, level, moves),
                    layers=layers_per_block,
                    downsample=not last,
                    padding=downsample_padding,
                )
            )
            skips += [widths[level]] * (layers_per_block + (not last))

        self.mid_block = MidStage(
            widths[-1],
            stage(mid_block_type, levels - 1, motion_module_mid_block),
            scale=mid_block_scale_factor,
        )

        self.up_blocks = nn.ModuleList()
        below = widths[-1]
        for level, kind in zip(reversed(range(levels)), up_block_types, strict=True):
            self.up_blocks.append(
                UpStage(
                    below,
                    [skips.pop() for _ in range(layers_per_block + 1)],
                    widths[level],
                    stage(kind, level, 2**level in motion_module_resolutions),
                    upsample=level > 0,
                )
            )
            below = widths[level]

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths[0], eps=norm_eps)
        self.conv_act = nn.SiLU()
        self.conv_out = FrameConv2d(widths[0], out_channels, kernel_size=3, padding=1)
        zero_(self.conv_out)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet3DConditionOutput | tuple[Tensor]:
        """Predict the noise in ``sample``.

        Args:
            sample: ``(B, in_channels, F, H, W)``, of the model's dtype. Any H and W.
            timestep: one number for all, or ``(B,)``. Pass a tensor under ``torch.compile``:
                a Python number becomes a constant of the graph.
            encoder_hidden_states: sound features ``(B*F, S, D)`` or ``(B, F, S, D)`` with
                ``D = cross_attention_dim``; none skips the attention to sound.
            return_dict: return a `UNet3DConditionOutput`, else a tuple of one.

        Raises:
            OptionError: a wrong rank, channel count, number of frames or feature dimension.
        """
        self._check(sample, encoder_hidden_states)
        audio = encoder_hidden_states
        if audio is not None and audio.ndim == 4:
            audio = audio.flatten(0, 1)  # (B*F, S, D)
        if self.config.center_input_sample:
            sample = 2 * sample - 1.0

        if not isinstance(timestep, Tensor):
            timestep = torch.tensor(timestep, device=sample.device)
        steps = timestep.to(sample.device).reshape(-1).expand(sample.shape[0])
        # The sinusoids are always made in fp32.
        temb = self.time_embedding(self.time_proj(steps).to(self.conv_in.weight.dtype))  # (B, T)

        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            x, made = block(x, temb, audio)
            skips += made
        x = self.mid_block(x, temb, audio)
        for block in self.up_blocks:
            count = self.config.layers_per_block + 1
            skips, joined = skips[:-count], skips[-count:]
            size = (skips[-1].shape[3], skips[-1].shape[4]) if skips else None
            x = block(x, joined, temb, audio, size)
        x = self.conv_out(self.conv_act(self.conv_norm_out(x)))
        return UNet3DConditionOutput(sample=x) if return_dict else (x,)

    def _check(self, sample: Tensor, audio: Tensor | None) -> None:
        if sample.ndim != 5:
            raise OptionError(
                f"sample: expected (batch, channels, frames, height, width), "
                f"got shape {tuple(sample.shape)}"
            )
        batch, channels, frames = sample.shape[:3]
        if channels != self.config.in_channels:
            raise OptionError(
                f"sample: {channels} channels, but the UNet takes {self.config.in_channels}"
            )
        if self.max_frames is not None and frames > self.max_frames:
            raise OptionError(
                f"sample: {frames} frames, but the motion modules know {self.max_frames} "
                "positions; use a smaller num_frames"
            )
        if audio is None or not self.config.add_audio_layer:
            return
        if audio.ndim not in (3, 4):
            raise OptionError(
                f"encoder_hidden_states: expected (batch*frames, tokens, features) or "
                f"(batch, frames, tokens, features), got shape {tuple(audio.shape)}"
            )
        if audio.shape[-1] != self.config.cross_attention_dim:
            raise OptionError(
                f"encoder_hidden_states: {audio.shape[-1]} features, but the UNet attends to "
                f"{self.config.cross_attention_dim}; the audio encoder does not fit the checkpoint"
            )
        leading = audio.shape[0] if audio.ndim == 3 else audio.shape[0] * audio.shape[1]
        if leading != batch * frames:
            raise OptionError(
                f"encoder_hidden_states: {leading} windows of sound for {batch} x {frames} frames"
            )


def _only(name: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"{name}: {value!r} is not supported; use one of {', '.join(allowed)}")

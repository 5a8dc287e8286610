"""Stand-ins with the interface of LatentSync's own UNet and pipeline, written for these tests.

The UNet's layers are few, but what lies between them is as there: group norms over a whole video,
convolutions of its frames, tokens of frames with frames innermost or outermost, written with
``permute`` and ``reshape`` to lists of sizes, as einops does. The pipeline's loop is its own, with
a detector and an image processor that are made in each run.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

WIDTH, HEADS, SOUND, FRAMES, SIDE = 16, 2, 24, 2, 8


def frames_to_batch(x: Tensor) -> Tensor:
    b, c, f, h, w = x.shape
    return x.permute([0, 2, 1, 3, 4]).reshape([b * f, c, h, w])


def batch_to_frames(x: Tensor, frames: int) -> Tensor:
    bf, c, h, w = x.shape
    return x.reshape([bf // frames, frames, c, h, w]).permute([0, 2, 1, 3, 4])


class FrameConv(nn.Conv2d):
    """A convolution of each frame of ``b c f h w``."""

    def forward(self, x: Tensor) -> Tensor:
        return batch_to_frames(super().forward(frames_to_batch(x)), x.shape[2])


class Resnet(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, channels), nn.GroupNorm(4, out)
        self.conv1 = FrameConv(channels, out, 3, padding=1)
        self.conv2 = FrameConv(out, out, 3, padding=1)
        self.time = nn.Linear(4 * WIDTH, out)
        self.shortcut = FrameConv(channels, out, 1) if channels != out else nn.Identity()
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(temb))[:, :, None, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (self.shortcut(x) + h) / 1.0


class Attention(nn.Module):
    """Attention to itself or the sound; over frames where ``temporal``."""

    def __init__(self, sound: int | None = None, *, temporal: bool = False) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_k = nn.Linear(sound or WIDTH, WIDTH, bias=False)
        self.to_v = nn.Linear(sound or WIDTH, WIDTH, bias=False)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0))
        self.temporal = temporal
        if temporal:
            self.register_buffer("places", torch.randn(1, 24, WIDTH) * 0.1)

    def heads(self, x: Tensor) -> Tensor:
        n, s, _ = x.shape
        return x.reshape(n, s, HEADS, WIDTH // HEADS).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, sound: Tensor | None = None, frames: int = 1) -> Tensor:
        places = x.shape[1]
        if self.temporal:  # (b f) s c -> (b s) f c
            b = x.shape[0] // frames
            x = x.reshape([b, frames, places, WIDTH]).permute([0, 2, 1, 3])
            x = x.reshape([b * places, frames, WIDTH])
            x = x + self.places[:, : x.size(1)]
        source = x if sound is None else sound
        parts = self.to_q(x), self.to_k(source), self.to_v(source)
        h = F.scaled_dot_product_attention(*map(self.heads, parts))
        h = h.permute(0, 2, 1, 3)
        h = self.to_out(h.reshape(h.shape[0], h.shape[1], WIDTH))
        if self.temporal:  # and back
            h = h.reshape([b, places, frames, WIDTH]).permute([0, 2, 1, 3])
            h = h.reshape([b * frames, places, WIDTH])
        return h


class Transformer(nn.Module):
    """Within each frame, and to its sound."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, WIDTH, eps=1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.attn1, self.attn2 = Attention(), Attention(SOUND)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.ff = FeedForward(WIDTH, activation_fn="geglu")

    def forward(self, x: Tensor, sound: Tensor) -> Tensor:
        frames, x = x.shape[2], frames_to_batch(x)
        n, c, h, w = x.shape
        t = self.proj_in(self.norm(x)).permute(0, 2, 3, 1).reshape(n, h * w, c)
        t = self.attn1(self.norm1(t)) + t
        t = self.attn2(self.norm2(t), sound) + t
        t = self.ff(self.norm3(t)) + t
        t = t.reshape(n, h, w, c).permute(0, 3, 1, 2).contiguous()
        return batch_to_frames(self.proj_out(t) + x, frames)


class Motion(nn.Module):
    """Over the frames, at each place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, WIDTH, eps=1e-6)
        self.proj_in, self.proj_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attentions = nn.ModuleList(Attention(temporal=True) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.ff = FeedForward(WIDTH, activation_fn="geglu")

    def forward(self, x: Tensor) -> Tensor:
        frames, x = x.shape[2], frames_to_batch(x)
        n, c, h, w = x.shape
        t = self.proj_in(self.norm(x).permute(0, 2, 3, 1).reshape(n, h * w, c))
        for attention, norm in zip(self.attentions, self.norms[:2], strict=True):
            t = attention(norm(t), frames=frames) + t
        t = self.ff(self.norms[2](t)) + t
        t = self.proj_out(t).reshape(n, h, w, c).permute(0, 3, 1, 2).contiguous()
        return batch_to_frames(t + x, frames)


class StandInUNet(nn.Module):
    """Two levels, the second at half the side; attention at the first, on both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=13, sample_size=SIDE, add_audio_layer=True)
        self.add_audio_layer = True
        self.time_proj = Timesteps(WIDTH, True, 0)
        self.time_embedding = TimestepEmbedding(WIDTH, 4 * WIDTH)
        self.conv_in = FrameConv(13, WIDTH, 3, padding=1)
        self.down = nn.ModuleList(Resnet(WIDTH, WIDTH) for _ in range(2))
        self.up = nn.ModuleList(Resnet(2 * WIDTH, WIDTH) for _ in range(2))
        self.spatial = nn.ModuleList(Transformer() for _ in range(2))
        self.motion = nn.ModuleList(Motion() for _ in range(2))
        self.downsample = FrameConv(WIDTH, WIDTH, 3, stride=2, padding=1)
        self.upsample = FrameConv(WIDTH, WIDTH, 3, padding=1)
        self.conv_norm_out = nn.GroupNorm(4, WIDTH)
        self.conv_out = FrameConv(WIDTH, 4, 3, padding=1)

    def level(self, index: int, x: Tensor, sound: Tensor) -> Tensor:
        return self.motion[index](self.spatial[index](x, sound))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        times = timestep[None] if len(timestep.shape) == 0 else timestep
        times = times.to(sample.device).expand(sample.shape[0])
        temb = self.time_embedding(self.time_proj(times).to(dtype=sample.dtype))
        sound = encoder_hidden_states
        first = self.conv_in(sample)
        wide = self.level(0, self.down[0](first, temb), sound)
        x = self.down[1](self.downsample(wide), temb)
        x = self.upsample(F.interpolate(x, scale_factor=[1.0, 2.0, 2.0], mode="nearest"))
        x = self.level(1, self.up[0](torch.cat([x, wide], dim=1), temb), sound)
        x = self.up[1](torch.cat([x, first], dim=1), temb)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return SimpleNamespace(sample=x) if return_dict else (x,)


class OneConvolution(nn.Module):
    """A UNet for tests of what is around it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = FrameConv(13, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Any:
        return SimpleNamespace(sample=self.conv(sample) + encoder_hidden_states.mean())


class Detector:
    """Finds the brightest place; counts its searches."""

    searches = 0

    def __call__(self, frame: np.ndarray, threshold: float = 0.5) -> tuple[Any, Any]:
        Detector.searches += 1
        row, column = np.unravel_index(int(frame[..., 0].argmax()), frame.shape[:2])
        return (column, row, column + 1, row + 1), np.array([row, column])


class Images:
    """Cuts faces with a drift that remembers the frame before, as a smoothed alignment does."""

    def __init__(self, resolution: int, mask_image: Tensor) -> None:
        self.mask_image = mask_image
        self.face_detector = Detector()
        self.resolution = resolution
        self._last = 0.0

    def affine_transform(self, frame: np.ndarray) -> tuple[Tensor, Any, Any]:
        box, place = self.face_detector(frame)
        self._last = 0.2 * self._last + 0.8 * float(place.sum())
        face = torch.from_numpy(frame).permute(2, 0, 1)
        return face, box, torch.tensor(self._last)

    def prepare_masks_and_masked_images(
        self, faces: Tensor, affine_transform: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert not affine_transform  # they are faces already
        pixels = (faces / 255.0 - 0.5) / 0.5
        masks = self.mask_image[:1].expand(len(faces), 1, -1, -1)
        return pixels, pixels * masks, masks


class LipsyncPipeline:
    """Frames and sounds in, frames out; the loop of chunks and steps is its own."""

    def __init__(self, unet: type[nn.Module] = StandInUNet) -> None:
        torch.manual_seed(0)
        self.unet = unet().eval().requires_grad_(False)
        self.vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=0.18215,
            shift_factor=0.0,
        ).eval()
        self.vae.requires_grad_(False)
        self.scheduler = DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False)
        self.audio_encoder = SimpleNamespace(audio2feat=lambda sound: sound)
        self.steps_seen: list[int] = []

    def affine_transform_video(self, frames: np.ndarray) -> tuple[Tensor, list[Any], list[Any]]:
        found = [self.image_processor.affine_transform(frame) for frame in frames]
        faces, boxes, matrices = ([each[part] for each in found] for part in range(3))
        return torch.stack(faces), boxes, matrices

    def prepare_mask_latents(self, masks: Tensor, masked: Tensor, guided: bool) -> Tensor:
        small = F.interpolate(masks, size=(SIDE, SIDE)).permute(1, 0, 2, 3)[None]
        return self.doubled(torch.cat([small, self.latents(masked)], dim=1), guided)

    def prepare_image_latents(self, pixels: Tensor, guided: bool) -> Tensor:
        return self.doubled(self.latents(pixels), guided)

    def latents(self, pixels: Tensor) -> Tensor:
        drawn = self.vae.encode(pixels).latent_dist.sample(generator=self.generator)
        return (drawn * self.vae.config.scaling_factor).permute(1, 0, 2, 3)[None]

    @staticmethod
    def doubled(x: Tensor, guided: bool) -> Tensor:
        return torch.cat([x] * 2) if guided else x

    @torch.no_grad()
    def __call__(
        self,
        frames: np.ndarray,
        sounds: Tensor,
        *,
        num_inference_steps: int = 4,
        guidance_scale: float = 1.5,
        num_frames: int = FRAMES,
        callback: Any = None,
        seed: int = 0,
    ) -> Tensor:
        self.generator = torch.Generator().manual_seed(seed)
        mask = torch.ones(3, frames.shape[1], frames.shape[2])
        mask[:, frames.shape[1] // 2 :] = 0
        self.image_processor = Images(frames.shape[1], mask)
        guided = guidance_scale > 1.0
        self.scheduler.set_timesteps(num_inference_steps)
        timesteps = self.scheduler.timesteps
        faces, _, matrices = self.affine_transform_video(frames)
        noise = torch.randn(1, 4, 1, SIDE, SIDE, generator=self.generator)
        noise = noise.repeat(1, 1, len(sounds), 1, 1)
        made = []
        for number in range(math.ceil(len(sounds) / num_frames)):
            part = slice(number * num_frames, (number + 1) * num_frames)
            sound = sounds[part]
            if guided:
                sound = torch.cat([torch.zeros_like(sound), sound])
            pixels, masked, masks = self.image_processor.prepare_masks_and_masked_images(
                faces[part]
            )
            mask_latents = self.prepare_mask_latents(masks, masked, guided)
            image_latents = self.prepare_image_latents(pixels, guided)
            latents = noise[:, :, part]
            for j, t in enumerate(timesteps):
                sample = torch.cat([latents] * 2) if guided else latents
                sample = torch.cat([sample, mask_latents, image_latents], dim=1)
                predicted = self.unet(sample, t, encoder_hidden_states=sound).sample
                if guided:
                    null, heard = predicted.chunk(2)
                    predicted = null + guidance_scale * (heard - null)
                latents = self.scheduler.step(predicted, t, latents).prev_sample
                if callback is not None:
                    callback(j, t, latents)
            flat = (latents / self.vae.config.scaling_factor)[0].permute(1, 0, 2, 3)
            decoded = self.vae.decode(flat).sample
            made.append(decoded * (1 - masks) + pixels * masks)
        return torch.cat(made) + torch.stack(matrices)[: len(sounds), None, None, None]


class DeepCacheSDHelper:
    """Wraps as the package's does: a closure in the place of the UNet's forward."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def enable(self) -> None:
        self.pipe.unet.forward = DeepCacheSDHelper.wrap(self.pipe.unet.forward)

    @staticmethod
    def wrap(forward: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        return wrapped


def clip(frames: int = 4, repeated: bool = False) -> tuple[np.ndarray, Tensor]:
    """Random frames (n, 16, 16, 3) uint8, each shown twice where ``repeated``; their sounds."""
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (frames, 2 * SIDE, 2 * SIDE, 3), dtype=np.uint8)
    if repeated:
        pictures = np.repeat(pictures[: (frames + 1) // 2], 2, axis=0)[:frames]
    return pictures, torch.randn(frames, 5, SOUND, generator=torch.Generator().manual_seed(3))

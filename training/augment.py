"""Random changes to faces and sound, on the device, the same for all frames of a clip.

The real footage is half a minute of two people, so everything that lets a network recognise a
single frame of it (framing, light, colour, the microphone) is varied, and what it has to learn
(how the mouth goes with the sound) is kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def uniform(n: int, low: float, high: float, like: Tensor) -> Tensor:
    """``(n,)`` fp32 numbers on the device of ``like``."""
    return torch.rand(n, device=like.device) * (high - low) + low


def jitter_geometry(clips: Tensor, *, strength: float = 1.0) -> Tensor:
    """Flip, scale, turn and shift each clip ``(B, N, 3, H, W)`` as a whole."""
    batch, frames, _, height, width = clips.shape
    flip = torch.where(uniform(batch, 0, 1, clips) < 0.5, -1.0, 1.0)
    scale = 1 + strength * uniform(batch, -0.06, 0.06, clips)
    turn = strength * uniform(batch, -0.06, 0.06, clips)
    shift = strength * (torch.rand(batch, 2, device=clips.device) - 0.5) * 0.08
    cos, sin = turn.cos() * scale, turn.sin() * scale
    theta = torch.stack(
        [
            torch.stack([cos * flip, -sin, shift[:, 0]], 1),
            torch.stack([sin * flip, cos, shift[:, 1]], 1),
        ],
        1,
    )  # (B, 2, 3)
    grid = F.affine_grid(theta, [batch, 1, height, width], align_corners=False)
    grid = grid.repeat_interleave(frames, 0).to(clips.dtype)
    moved = F.grid_sample(
        clips.flatten(0, 1), grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    return moved.view_as(clips)


def jitter_colour(clips: Tensor, *, strength: float = 1.0) -> Tensor:
    """Brightness, contrast, gamma, saturation and tint of clips ``(B, N, 3, H, W)`` in [-1, 1]."""
    batch = len(clips)
    # Some clips stay almost as they are: those look like what the model will meet.
    amount = (strength * uniform(batch, 0, 1, clips)).view(batch, 1, 1, 1, 1)

    def draw(low: float, high: float, channels: int = 1) -> Tensor:
        values = uniform(batch * channels, low, high, clips).view(batch, 1, channels, 1, 1)
        return (amount * values).to(clips.dtype)

    x = (clips + 1) / 2
    x = x.clamp(1e-3, 1) ** torch.exp(draw(-0.25, 0.25))
    grey = x.mean(dim=2, keepdim=True)
    x = grey + (x - grey) * (1 + draw(-0.3, 0.25))
    x = (x - 0.45) * (1 + draw(-0.2, 0.2)) + 0.45 + draw(-0.1, 0.1)
    x = x * (1 + draw(-0.08, 0.08, channels=3))
    return x.clamp(0, 1) * 2 - 1


def jitter_sound(sound: Tensor) -> Tensor:
    """Another microphone and room for each sound ``(B, n)``: level, tone and noise."""
    batch = len(sound)
    level = torch.exp(uniform(batch, -1.2, 0.7, sound))[:, None]
    # A three-tap filter tilts the spectrum one way or the other.
    tilt = uniform(batch, -0.6, 0.6, sound)[:, None]
    padded = F.pad(sound, (1, 0))
    filtered = sound + tilt * padded[:, :-1]
    filtered = filtered / (1 + tilt.abs())
    loud = sound.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-4)
    amount = 10 ** uniform(batch, -3.5, -1.3, sound)[:, None]  # -70 to -26 dB
    amount = amount * (uniform(batch, 0, 1, sound)[:, None] < 0.6)
    return (filtered + loud * amount * torch.randn_like(sound)) * level


def borrow_voice(sound: Tensor, voice: Tensor, *, window: int = 800) -> Tensor:
    """Other words, as loud from moment to moment: ``voice (B, n)`` with the level of ``sound``.

    The level is the RMS over ``window`` samples (a twentieth of a second). How loud the words
    are is most of what opens a mouth, and nothing else of the sound is left to know it by.
    """

    def level(x: Tensor) -> Tensor:
        half = window // 2
        power = F.pad(x.square()[:, None], (half, half), mode="replicate")
        for _ in range(2):  # two boxes make a triangle
            power = F.avg_pool1d(power, half, stride=1)
        return power[:, 0, : x.shape[1]].clamp(min=0).sqrt()

    usual = voice.square().mean(dim=1, keepdim=True).sqrt()
    # Pauses of the voice are not amplified beyond 20 dB: they hold only noise.
    return voice * level(sound) / torch.maximum(level(voice), 0.1 * usual).clamp(min=1e-5)


def jitter_mel(mel: Tensor) -> Tensor:
    """Another voice, and gaps, for log-mel bands ``(B, bands, frames)`` (about -1 to 1).

    The bands are stretched by up to an eighth, as a longer or shorter vocal tract does
    (Jaitly and Hinton, 2013), and two stripes of bands and one of time are set to the mean
    (SpecAugment, https://arxiv.org/abs/1904.08779). With half a minute of real speech a network
    would otherwise learn utterances by heart.
    """
    batch, bands, frames = mel.shape
    place = torch.arange(bands, device=mel.device, dtype=torch.float32)
    stretch = 1 + uniform(batch, -0.125, 0.125, mel)
    source = (place[None] * stretch[:, None]).clamp(max=bands - 1)  # (B, bands)
    low = source.floor().long().clamp(max=bands - 2)
    part = (source - low)[:, :, None].to(mel.dtype)

    def rows(index: Tensor) -> Tensor:
        return mel.gather(1, index[:, :, None].expand(-1, -1, frames))

    mel = rows(low) * (1 - part) + rows(low + 1) * part
    mean = mel.mean(dim=(1, 2), keepdim=True)
    time = torch.arange(frames, device=mel.device, dtype=torch.float32)

    def stripe(line: Tensor, widest: float) -> Tensor:
        """Which of ``line (n,)`` lie in a random stripe: ``(B, n)``."""
        centre = uniform(batch, 0, float(len(line)), mel)[:, None]
        half = uniform(batch, 0, widest / 2, mel)[:, None]
        return (line[None] - centre).abs() < half

    hidden = stripe(place, bands / 6)[:, :, None] | stripe(place, bands / 6)[:, :, None]
    hidden = hidden | stripe(time, 8)[:, None, :]
    return torch.where(hidden, mean, mel)


def colour_mel(mel: Tensor) -> Tensor:
    """Another microphone for log-mel bands ``(B, bands, frames)`` (0.1 is 3 dB).

    Up to 9 dB more or less at each of six places over the bands, and noise of up to 2 dB on
    every value, so that neither the recording nor the fine structure of a sound gives away
    which utterance it is.
    """
    batch, bands, _ = mel.shape
    gains = (torch.rand(batch, 1, 6, device=mel.device) - 0.5) * 0.6
    curve = F.interpolate(gains, size=bands, mode="linear", align_corners=True)[:, 0]
    noise = 0.06 * torch.rand(batch, 1, 1, device=mel.device)
    return mel + (curve[:, :, None] + noise * torch.randn_like(mel)).to(mel.dtype)

"""Brings the prepared data folder onto the device as `training.sources.Footage`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lsync_compile.media.mask import mouth_mask
from training.data import Clip, TrainingData
from training.sources import Footage, Recording


def load_footage(folder: Path, device: torch.device, *, size: int = 256) -> Footage:
    """All clips and voices of ``folder`` (made by `training.prepare`), faces at ``size``."""
    data = TrainingData(folder)
    recordings = [recording(clip, device, size) for clip in data.clips]
    by_name = {r.name: r for r in recordings}
    for take in recordings:
        # Portraits come in pairs a, b: the same motion of the head, different words.
        if take.kind == "portrait" and take.name[-1] in "ab":
            mate = take.name[:-1] + ("b" if take.name.endswith("a") else "a")
            take.second = by_name.get(mate)
    mask = mouth_mask(size).to(device)
    return Footage(recordings, list(data.speech.values()), mask, size)


def recording(clip: Clip, device: torch.device, size: int) -> Recording:
    return Recording(
        name=clip.name,
        kind=clip.kind,
        frames=shrink(clip.frames, size).to(device),
        sound=clip.sound.to(device),
        train=len(clip.train_frames),
    )


def shrink(frames: Tensor, size: int) -> Tensor:
    """uint8 ``(n, 3, H, W)`` at another size, by averaging."""
    if frames.shape[-1] == size:
        return frames
    small = F.interpolate(frames.float(), (size, size), mode="area")
    return small.round().to(torch.uint8)

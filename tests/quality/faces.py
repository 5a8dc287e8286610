"""Drawn faces whose mouths open by a known amount, aligned as LatentSync aligns them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
SKIN = (0.85, 0.62, 0.52)


def talking_faces(
    opening: Array,
    *,
    side: int = 128,
    skin: tuple[float, float, float] = SKIN,
    teeth: bool = False,
) -> Tensor:
    """(F, 3, side, side) in [0, 1]; `opening` is the gap between the lips, 0 to 1."""
    y, x = (np.mgrid[0:side, 0:side] + 0.5) / side
    faces = np.empty((len(opening), side, side, 3), dtype=np.float32)
    for face, amount in zip(faces, opening, strict=True):
        face[:] = skin
        middle = 0.655 + 0.03 * amount
        lips = _ellipse(x - 0.48, y - middle, 0.16, 0.05 + 0.05 * amount)
        gap = _ellipse(x - 0.48, y - middle, 0.13, 0.004 + 0.045 * amount)
        _paint(face, (0.70, 0.35, 0.33), lips)
        _paint(face, (0.12, 0.05, 0.05), gap)
        if teeth:
            _paint(face, (0.85, 0.82, 0.75), gap * (y < middle - 0.015))
    return torch.from_numpy(faces).permute(0, 3, 1, 2)


def _ellipse(x: Array, y: Array, width: float, height: float) -> Array:
    """1 inside, 0 outside, with an edge as soft as a camera's: (side, side)."""
    distance = (np.sqrt((x / width) ** 2 + (y / height) ** 2) - 1) * min(width, height)
    return np.clip(0.5 - distance / 0.012, 0, 1)


def _paint(face: NDArray[np.float32], colour: tuple[float, float, float], cover: Array) -> None:
    face += cover[:, :, None] * (np.array(colour) - face)


def syllables(frames: int, *, seed: int = 0) -> Array:
    """(frames,) in [0, 1]: a mouth that opens and closes four times a second or so."""
    generator = np.random.default_rng(seed)
    times, strengths = [2.0], [1.0]
    while times[-1] < frames:
        times.append(times[-1] + generator.uniform(4, 10))
        strengths.append(generator.uniform(0.2, 1.0))
    grid = np.arange(frames)[:, None]
    bumps = np.array(strengths) * np.exp(-0.5 * ((grid - np.array(times)) / 1.5) ** 2)
    return bumps.sum(axis=1).clip(0, 1)


def voice(opening: Array, *, sample_rate: int = 16_000) -> NDArray[np.float32]:
    """A tone of 1500 Hz that is as loud as the mouth is open, 25 frames a second."""
    samples = len(opening) * sample_rate // 25
    time = np.arange(samples) / sample_rate
    centres = (np.arange(len(opening)) + 0.5) / 25
    loudness = np.interp(time, centres, opening)
    return (0.3 * loudness * np.sin(2 * np.pi * 1500 * time)).astype(np.float32)

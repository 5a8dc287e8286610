"""The region of the aligned face that the model generates.

LatentSync hides the lower face and not the mouth alone, so that the visible jaw and cheeks cannot
tell the model what the mouth was saying: two blocks beside the nose, and below them a bowl that
ends at the chin. The shape here is described by a few fractions of the face square's side and is
drawn at any resolution; it overlaps LatentSync's own picture by 99 % (intersection over union).
A checkpoint that was trained with another picture brings it along as a file.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lsync_compile.errors import CheckpointError

# Fractions of the side of the face square.
_TOP, _BOTTOM = 0.371, 0.949
_LEFT, _RIGHT = 0.035, 0.967
_NOSE_LEFT, _NOSE_RIGHT, _NOSE_BOTTOM = 0.305, 0.695, 0.500
# From the nose down to the bend the sides draw in slowly, from there on as a superellipse.
_BEND, _TAPER = 0.633, 0.008
_CURVE_DOWN, _CURVE_ACROSS = 1.4, 2.2


def mouth_mask(resolution: int, path: str | Path | None = None) -> Tensor:
    """Mask of an aligned face: 1 where it is kept, 0 where it is generated.

    Args:
        resolution: side R of the aligned face in pixels.
        path: picture to use instead of the built-in shape, white where the face is kept; resized
            to the resolution (Lanczos, so its edges may be grey). Its first channel (red) counts.

    Returns:
        (1, R, R) float32 in [0, 1].

    Raises:
        CheckpointError: `path` is missing or no picture.
    """
    if path is None:
        kept = ~_generated(resolution)
        return torch.from_numpy(kept.astype(np.float32))[None]
    try:
        data = np.fromfile(path, dtype=np.uint8)  # OpenCV says in lines of its own what is missing
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
    except (OSError, ValueError, cv2.error):
        picture = None
    if picture is None:
        raise CheckpointError(f"{path}: no such picture, or not one; expected a PNG mouth mask")
    red = cv2.resize(picture[:, :, 2], (resolution, resolution), interpolation=cv2.INTER_LANCZOS4)
    return torch.from_numpy(red.astype(np.float32) / 255)[None]


def _generated(resolution: int) -> npt.NDArray[np.bool_]:
    """The built-in shape, (R, R), true inside."""
    centres = (np.arange(resolution) + 0.5) / resolution
    x, y = np.meshgrid(centres, centres)
    half = (_RIGHT - _LEFT) / 2
    upper = ((centres - _NOSE_BOTTOM) / (_BEND - _NOSE_BOTTOM)).clip(0, 1)
    lower = ((centres - _BEND) / (_BOTTOM - _BEND)).clip(0, 1)
    bowl = (1 - lower**_CURVE_DOWN) ** (1 / _CURVE_ACROSS)
    reach = (half - _TAPER * upper**2) * bowl
    inside = np.abs(x - (_LEFT + _RIGHT) / 2) < reach[:, None]
    nose = (x > _NOSE_LEFT) & (x < _NOSE_RIGHT) & (y < _NOSE_BOTTOM)
    result: npt.NDArray[np.bool_] = inside & (y > _TOP) & (y < _BOTTOM) & ~nose
    return result

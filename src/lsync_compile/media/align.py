"""Face alignment and paste-back as LatentSync does them.

Two brow centres and the nose centre fix a similarity transform from the frame to an upright
"face square" of ``75 ratio`` by ``100 ratio`` pixels (``ratio = resolution / 256 * 2.8``), which
is then resized to ``resolution`` by ``resolution``. The way back resizes the generated face, warps
it into the frame and blends it in under a soft mask that is eroded and blurred by about a
twentieth of the face's size.

The results equal those of the original implementation (LatentSync, Li et al. 2024,
arXiv:2412.09262, alignment after StyleSync, Guan et al. 2023) up to rounding. A pixel's coordinate
is its centre: sample ``(0, 0)`` is the middle of the first pixel. Sampling is bilinear at exact
coordinates, not at the 1/32 pixel steps of ``cv2.warpAffine``.

All functions are pure and may run in any thread; only `FaceAligner` keeps state.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from lsync_compile.media.geometry import (
    FILL,
    Box,
    FaceAligner,
    Frame,
    Matrix,
    bounds,
    face_size,
    face_template,
    invert,
)

__all__ = [
    "FaceAligner",
    "Frame",
    "Matrix",
    "crop_face",
    "face_size",
    "face_template",
    "paste_face",
    "restore_face",
    "warp_face",
]


def warp_face(frame: Frame, matrix: Matrix, resolution: int) -> Frame:
    """The face square cut from `frame` (H, W, 3), before resizing: (100 ratio, 75 ratio, 3) uint8.

    What lies outside the frame is grey (127).
    """
    height, width = frame.shape[:2]
    w, h = face_size(resolution)
    to_frame = invert(matrix)
    # Only the part of the frame under the square is converted to float.
    x0, y0, x1, y1 = bounds(to_frame, (w, h), (width, height))
    if x0 >= x1 or y0 >= y1:
        return np.full((h, w, 3), int(FILL), dtype=np.uint8)
    part = _to_tensor(frame[y0:y1, x0:x1])
    to_part = to_frame - np.array([[0, 0, x0], [0, 0, y0]])
    face = _sample(part, to_part, (0, 0, w, h))
    coverage = _coverage(to_part, (x1 - x0, y1 - y0), (0, 0, w, h))
    face += FILL * (1 - coverage)
    return np.ascontiguousarray(face.permute(1, 2, 0).to(torch.uint8).numpy())


def crop_face(frame: Frame, matrix: Matrix, resolution: int) -> Frame:
    """The aligned face as the model sees it: (resolution, resolution, 3) uint8."""
    face = warp_face(frame, matrix, resolution)
    resized = cv2.resize(face, (resolution, resolution), interpolation=cv2.INTER_LANCZOS4)
    return np.asarray(resized, dtype=np.uint8)


def restore_face(frame: Frame, face: Tensor, matrix: Matrix) -> Frame:
    """Paste a generated face back into its frame.

    Args:
        frame: (H, W, 3) uint8, the frame that the face was cropped from. Not changed.
        face: (3, R, R) floating point in [-1, 1], R the resolution used by `crop_face`.
        matrix: (2, 3), the transform used by `crop_face`.

    Returns:
        A new (H, W, 3) uint8 frame. Pixels outside the face square are those of `frame`.
    """
    width, height = face_size(face.shape[-1])
    square = F.interpolate(
        face[None].float().cpu(),
        size=(height, width),
        mode="bicubic",
        align_corners=False,
        antialias=True,
    )[0]
    return paste_face(frame, square, matrix)


def paste_face(frame: Frame, square: Tensor, matrix: Matrix) -> Frame:
    """As `restore_face`, with the face already resized to the face square, (3, h, w)."""
    height, width = frame.shape[:2]
    h, w = square.shape[-2:]
    box = bounds(invert(matrix), (w, h), (width, height))
    return _paste_within(frame, square, matrix, box)


def _paste_within(frame: Frame, square: Tensor, matrix: Matrix, box: Box) -> Frame:
    """`paste_face` that computes only `box`; any box around the square gives the same frame."""
    result = frame.copy()
    x0, y0, x1, y1 = box
    if x0 >= x1 or y0 >= y1:
        return result
    to_square = np.asarray(matrix, dtype=np.float64)
    h, w = square.shape[-2:]
    coverage = _coverage(to_square, (w, h), box)
    face = _sample(square.float(), to_square, box) + FILL * (1 - coverage)
    face = (face / 2 + 0.5).clamp_(0, 1).mul_(255)
    mask, soft = _paste_masks(coverage.numpy())
    soft_t = torch.from_numpy(soft)
    face *= torch.from_numpy(mask)
    part = _to_tensor(frame[y0:y1, x0:x1])
    blended = soft_t * face + (1 - soft_t) * part
    result[y0:y1, x0:x1] = blended.permute(1, 2, 0).to(torch.uint8).numpy()
    return result


def _paste_masks(
    coverage: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Where the face is known, and how much of it is shown: two (h, w) masks in [0, 1]."""
    # A 2x2 minimum over each pixel and its upper and left neighbours drops half-covered edges.
    kernel = np.ones((2, 2), dtype=np.uint8)
    mask = cv2.erode(coverage, kernel, anchor=(1, 1))
    edge = int(math.sqrt(float(mask.sum(dtype=np.float64)))) // 20
    if edge == 0:
        return mask, mask
    core = cv2.erode(mask, np.ones((2 * edge, 2 * edge), dtype=np.uint8))
    sigma = 0.3 * (edge - 1) + 0.8
    offsets = np.arange(-edge, edge + 1, dtype=np.float64)
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    weights /= weights.sum()
    soft = cv2.sepFilter2D(core, cv2.CV_32F, weights, weights, borderType=cv2.BORDER_REFLECT_101)
    return np.asarray(mask, dtype=np.float32), np.asarray(soft, dtype=np.float32)


def _coordinates(
    to_source: npt.NDArray[np.float64], box: Box
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Source coordinates x and y, each (h, w), of the pixels of `box`.

    They come from the pixels' absolute positions, so a pixel's value does not depend on the box.
    """
    x0, y0, x1, y1 = box
    columns, rows = np.arange(x0, x1, dtype=np.float64), np.arange(y0, y1, dtype=np.float64)
    (a, b, c), (d, e, f) = to_source
    x = (a * columns)[None, :] + (b * rows + c)[:, None]
    y = (d * columns)[None, :] + (e * rows + f)[:, None]
    return x, y


def _coverage(to_source: npt.NDArray[np.float64], size: tuple[int, int], box: Box) -> Tensor:
    """How much of each bilinear sample lies inside a source of `size`: (h, w) float32 in [0, 1]."""
    x, y = _coordinates(to_source, box)
    w, h = size
    across = np.minimum(x + 1, w - x).clip(0, 1)
    down = np.minimum(y + 1, h - y).clip(0, 1)
    return torch.from_numpy((across * down).astype(np.float32))


def _sample(source: Tensor, to_source: npt.NDArray[np.float64], box: Box) -> Tensor:
    """Bilinear samples of `source` (C, h, w) at the pixels of `box`, zero outside: (C, H, W)."""
    x, y = _coordinates(to_source, box)
    h, w = source.shape[-2:]
    grid = np.empty((*x.shape, 2), dtype=np.float32)
    np.multiply(x, 2 / max(w - 1, 1), out=grid[..., 0], casting="same_kind")
    np.multiply(y, 2 / max(h - 1, 1), out=grid[..., 1], casting="same_kind")
    grid -= 1
    return F.grid_sample(
        source[None],
        torch.from_numpy(grid)[None],
        mode="bilinear",
        padding_mode="zeros",
        align_corners=True,
    )[0]


def _to_tensor(pixels: Frame) -> Tensor:
    """(h, w, C) uint8 to (C, h, w) float32, contiguous."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float().contiguous()

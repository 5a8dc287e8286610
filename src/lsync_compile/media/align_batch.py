"""Alignment and paste-back for the frames of a chunk together, on the device.

The same transforms as :mod:`lsync_compile.media.align`, within rounding: one upload of the part of
the frames under the faces, a few batched operations, one download. Resizing (Lanczos with four
lobes) and blurring are products with small matrices that are made once for each size. The host
waits once in a restoration, for the sizes of the chunk's faces, which choose the width of their
soft edge.

On a CPU the functions for single frames are faster: they touch each pixel while it is in cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lsync_compile.media.geometry import FILL, Box, Frame, Matrix, bounds, face_size, invert

_LOBES = 4


class BatchAligner:
    """Cuts and restores the faces of many frames at a time.

    Args:
        resolution: side R of the aligned face in pixels.
        device: where the work is done and the faces are.
        group: frames at a time; a group of 8 faces of 600 x 800 pixels takes about 250 MiB.
    """

    def __init__(self, resolution: int, device: torch.device, *, group: int = 8) -> None:
        self.resolution = resolution
        self.device = device
        self._group = group

    @torch.no_grad()
    def crop(self, frames: Sequence[Frame], matrices: Sequence[Matrix]) -> Tensor:
        """Aligned faces, (n, 3, R, R) uint8 on the device.

        Args:
            frames: n pictures (H, W, 3) uint8, all of one size.
            matrices: n transforms from frame to face square, (2, 3).
        """
        size, side = face_size(self.resolution), self.resolution
        groups = self._groups(len(frames))
        faces = [self._warp(frames[part], matrices[part], size) for part in groups]
        down, across = (lanczos(length, side, self.device) for length in (size[1], size[0]))
        squares = torch.cat(faces)
        resized = torch.matmul(torch.matmul(down, squares), across.T)
        return resized.round_().clamp_(0, 255).to(torch.uint8)

    @torch.no_grad()
    def restore(
        self, frames: Sequence[Frame], faces: Tensor, matrices: Sequence[Matrix]
    ) -> list[Frame]:
        """New frames with the faces (n, 3, R, R), floating point in [-1, 1], pasted in."""
        restored: list[Frame] = []
        width, height = face_size(faces.shape[-1])
        for part in self._groups(len(frames)):
            squares = F.interpolate(
                faces[part].to(self.device, torch.float32),
                size=(height, width),
                mode="bicubic",
                align_corners=False,
                antialias=True,
            )
            restored += self._paste(frames[part], squares, matrices[part])
        return restored

    def _groups(self, count: int) -> list[slice]:
        return [slice(i, min(i + self._group, count)) for i in range(0, count, self._group)]

    def _warp(
        self, frames: Sequence[Frame], matrices: Sequence[Matrix], size: tuple[int, int]
    ) -> Tensor:
        """Face squares before resizing, whole levels as float32 (n, 3, h, w)."""
        to_frame = np.stack([invert(matrix) for matrix in matrices])
        x0, y0, x1, y1 = box = self._box(frames, to_frame, size)
        width, height = size
        if x0 >= x1 or y0 >= y1:
            shape = (len(frames), 3, height, width)
            return torch.full(shape, float(int(FILL)), device=self.device)
        to_part = to_frame - np.array([[0, 0, x0], [0, 0, y0]])
        x, y = self._coordinates(to_part, (0, 0, width, height))
        part = self._upload(frames, box)
        face = _sample(part, x, y) + FILL * (1 - _coverage(x, y, (x1 - x0, y1 - y0)))
        return face.to(torch.uint8).float()

    def _paste(
        self, frames: Sequence[Frame], squares: Tensor, matrices: Sequence[Matrix]
    ) -> list[Frame]:
        """`restore` with faces resized to the face square, (n, 3, h, w)."""
        size = (squares.shape[-1], squares.shape[-2])
        to_frame = np.stack([invert(matrix) for matrix in matrices])
        x0, y0, x1, y1 = box = self._box(frames, to_frame, size)
        results = [frame.copy() for frame in frames]
        if x0 >= x1 or y0 >= y1:
            return results
        x, y = self._coordinates(np.stack(matrices).astype(np.float64), box)
        coverage = _coverage(x, y, size)
        face = _sample(squares, x, y) + FILL * (1 - coverage)
        face = (face / 2 + 0.5).clamp_(0, 1).mul_(255)
        mask = _erode(coverage, 1, 0)
        face *= mask
        soft = self._soften(mask)
        part = self._upload(frames, box)
        blended = soft * face + (1 - soft) * part
        pixels = blended.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()
        for result, piece in zip(results, pixels, strict=True):
            result[y0:y1, x0:x1] = piece
        return results

    def _soften(self, mask: Tensor) -> Tensor:
        """How much of the face is shown, from where it is known: (n, 1, H, W) in [0, 1]."""
        areas = mask.sum(dim=(1, 2, 3), dtype=torch.float64)
        # The one time that the host waits.
        edges = [int(math.sqrt(area)) // 20 for area in areas.tolist()]
        soft = torch.empty_like(mask)
        height, width = mask.shape[-2:]
        for edge in sorted(set(edges)):
            places = [place for place, each in enumerate(edges) if each == edge]
            some = mask[places]
            if edge:
                core = _erode(some, edge, edge - 1)
                down, across = (blur(n, edge, self.device) for n in (height, width))
                some = torch.matmul(torch.matmul(down, core), across.T)
            soft[places] = some
        return soft

    def _box(self, frames: Sequence[Frame], to_frame: np.ndarray, size: tuple[int, int]) -> Box:
        """The box of the frames that holds all their faces."""
        height, width = frames[0].shape[:2]
        boxes = np.array([bounds(each, size, (width, height)) for each in to_frame])
        inside = boxes[(boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])]
        if not len(inside):
            return 0, 0, 0, 0
        x0, y0 = inside[:, :2].min(axis=0).tolist()
        x1, y1 = inside[:, 2:].max(axis=0).tolist()
        return x0, y0, x1, y1

    def _upload(self, frames: Sequence[Frame], box: Box) -> Tensor:
        """A box of all frames as float32 (n, 3, H, W)."""
        x0, y0, x1, y1 = box
        on_gpu = self.device.type == "cuda"
        shape = (len(frames), y1 - y0, x1 - x0, 3)
        parts = torch.empty(shape, dtype=torch.uint8, pin_memory=on_gpu)
        np.stack([frame[y0:y1, x0:x1] for frame in frames], out=parts.numpy())
        uploaded = parts.to(self.device, non_blocking=on_gpu)
        return uploaded.permute(0, 3, 1, 2).float().contiguous()

    def _coordinates(self, to_source: np.ndarray, box: Box) -> tuple[Tensor, Tensor]:
        """Source coordinates x and y, each (n, H, W) float64, of the pixels of a box."""
        x0, y0, x1, y1 = box
        (a, b, c), (d, e, f) = (
            torch.from_numpy(to_source).permute(1, 2, 0)[..., None, None].to(self.device)
        )
        columns = torch.arange(x0, x1, dtype=torch.float64, device=self.device)
        rows = torch.arange(y0, y1, dtype=torch.float64, device=self.device)[:, None]
        return a * columns + (b * rows + c), d * columns + (e * rows + f)


def _coverage(x: Tensor, y: Tensor, size: tuple[int, int]) -> Tensor:
    """How much of each sample lies inside a source of `size`: (n, 1, H, W) float32 in [0, 1]."""
    w, h = size
    across = torch.minimum(x + 1, w - x).clamp_(0, 1)
    down = torch.minimum(y + 1, h - y).clamp_(0, 1)
    return (across * down).float()[:, None]


def _sample(source: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Bilinear samples of (n, C, h, w) at coordinates (n, H, W), zero outside: (n, C, H, W)."""
    h, w = source.shape[-2:]
    grid = torch.stack(
        [(x * (2 / max(w - 1, 1))).float(), (y * (2 / max(h - 1, 1))).float()], dim=-1
    ).sub_(1)
    return F.grid_sample(source, grid, "bilinear", "zeros", align_corners=True)


def _erode(mask: Tensor, before: int, after: int) -> Tensor:
    """Minimum over a square from `before` pixels above and left to `after` below and right."""
    pads = (before, after, before, after)
    padded = F.pad(-mask, pads, value=-float("inf"))
    span = before + after + 1
    rows = F.max_pool2d(padded, (span, 1), stride=1)
    return -F.max_pool2d(rows, (1, span), stride=1)


@lru_cache(maxsize=16)
def lanczos(length: int, side: int, device: torch.device) -> Tensor:
    """Matrix (side, length) that resizes with Lanczos' kernel of four lobes, edges repeated.

    The kernel is not widened where the picture shrinks, as in ``cv2.INTER_LANCZOS4``.
    """
    centres = (np.arange(side) + 0.5) * length / side - 0.5
    taps = np.floor(centres)[:, None] + np.arange(1 - _LOBES, _LOBES + 1)
    distance = centres[:, None] - taps
    weights = np.sinc(distance) * np.sinc(distance / _LOBES)
    weights /= weights.sum(axis=1, keepdims=True)
    return _matrix(weights, taps.clip(0, length - 1), length, device)


@lru_cache(maxsize=64)
def blur(length: int, edge: int, device: torch.device) -> Tensor:
    """Matrix (length, length) of a Gaussian over 2 edge + 1 pixels, mirrored at the ends."""
    sigma = 0.3 * (edge - 1) + 0.8
    offsets = np.arange(-edge, edge + 1, dtype=np.float64)
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    weights = np.tile(weights / weights.sum(), (length, 1))
    period = max(1, 2 * (length - 1))
    places = (np.arange(length)[:, None] + offsets) % period
    places = np.minimum(places, period - places)
    return _matrix(weights, places, length, device)


def _matrix(weights: np.ndarray, places: np.ndarray, length: int, device: torch.device) -> Tensor:
    """Rows of `weights` put at `places`, summed where they coincide."""
    matrix = np.zeros((len(weights), length))
    rows = np.broadcast_to(np.arange(len(weights))[:, None], weights.shape)
    np.add.at(matrix, (rows, places.astype(np.intp)), weights)
    return torch.from_numpy(matrix.astype(np.float32)).to(device)

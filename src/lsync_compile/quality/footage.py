"""Pictures of a run, kept without loss in a temporary file instead of in memory."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Footage:
    """Pictures of one size, written once in order and read anywhere.

    The file has no name and goes away with the object, also after an interrupt. A frame of
    1080x1920 takes 6 MB, an aligned face in float32 1 to 3 MB.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="lsync-quality-")  # noqa: SIM115  lives on
        self._shape: tuple[int, ...] | None = None
        self._dtype: np.dtype[Any] = np.dtype(np.uint8)
        self._first = 0  # picture of the file
        self._count = 0
        self._map: NDArray[Any] | None = None

    def __len__(self) -> int:
        return self._count

    def append(self, picture: NDArray[Any]) -> None:
        """Add one picture (H, W, 3), uint8 or float32 in [0, 1]; the first sets size and type.

        Raises:
            ValueError: size or type differ from the first picture's.
        """
        if self._shape is None:
            self._shape, self._dtype = picture.shape, picture.dtype
        if picture.shape != self._shape or picture.dtype != self._dtype:
            raise ValueError(
                f"picture {self._count} is {picture.shape} {picture.dtype}, "
                f"the first was {self._shape} {self._dtype}"
            )
        self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(picture).tobytes())
        self._count += 1
        self._map = None

    def part(self, start: int, stop: int) -> Footage:
        """Frames [start, stop), in the same file: not to be written to."""
        part = copy.copy(self)
        part._first, part._count = self._first + start, max(0, min(stop, self._count) - start)
        part._map = None
        return part

    def clip(self, start: int, stop: int) -> Tensor:
        """Frames [start, stop) as (F, 3, H, W) float32 in [0, 1]."""
        pictures = np.array(self._pictures()[start:stop])
        clip = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        return clip.float() / 255 if self._dtype == np.uint8 else clip

    def pieces(self, length: int = 8) -> Iterator[Tensor]:
        """All frames in order as clips of up to ``length`` frames."""
        for start in range(0, len(self), length):
            yield self.clip(start, min(start + length, len(self)))

    def picture(self, index: int) -> NDArray[np.uint8]:
        """One picture as (H, W, 3) uint8."""
        picture = np.array(self._pictures()[index])
        if self._dtype != np.uint8:
            picture = np.rint(picture * 255).clip(0, 255)
        result: NDArray[np.uint8] = picture.astype(np.uint8)
        return result

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels; zeros while there is no picture."""
        return (self._shape[0], self._shape[1]) if self._shape else (0, 0)

    def _pictures(self) -> NDArray[Any]:
        if self._shape is None:
            raise IndexError("no picture was stored")
        if self._map is None:
            self._file.flush()
            shape = (self._count, *self._shape)
            offset = self._first * int(np.prod(self._shape)) * self._dtype.itemsize
            self._map = np.memmap(
                self._file, dtype=self._dtype, mode="r", offset=offset, shape=shape
            )
        return self._map

"""Clips and sounds that are in memory already, where otherwise files stand.

Other programs hand over decoded frames and samples. Nothing is copied as a whole: a frame becomes
8 bits when it is its turn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lsync_compile.errors import MediaError, OptionError
from lsync_compile.media.audio import Samples, load_audio, resample
from lsync_compile.media.video import PingPongReader, count_frames, on_grid

Frame = npt.NDArray[np.uint8]


class FrameArray:
    """Frames in memory as a clip.

    Args:
        frames: (n, H, W, c) with c at least 3, of which the first three are R, G, B: floating
            point in [0, 1], or uint8. On any device; never written to.
        fps: their constant rate.

    Raises:
        MediaError: there is no frame.
        OptionError: another shape or type, or a rate that is none.
    """

    def __init__(self, frames: Tensor | npt.NDArray[Any], fps: float) -> None:
        self._frames = torch.from_numpy(frames) if isinstance(frames, np.ndarray) else frames
        shape, dtype = tuple(self._frames.shape), self._frames.dtype
        if len(shape) != 4 or shape[3] < 3 or not (dtype.is_floating_point or dtype == torch.uint8):
            raise OptionError(
                "frames must be (n, height, width, 3), floating point in [0, 1] or uint8, "
                f"not {shape} {str(dtype).removeprefix('torch.')}"
            )
        if not (math.isfinite(fps) and fps > 0):
            raise OptionError(f"fps must be a number above 0, not {fps!r}")
        self.fps = fps
        if not all(shape):
            raise MediaError(f"{self}: there is no frame in it")

    def __len__(self) -> int:
        return len(self._frames)

    def __str__(self) -> str:
        count, height, width = self._frames.shape[:3]
        return f"clip in memory ({count} frames of {width}x{height})"

    def __getitem__(self, index: int) -> Frame:
        """One frame, (H, W, 3) uint8 RGB, an array of its own."""
        picture = self._frames[index, :, :, :3]
        if picture.dtype != torch.uint8:
            picture = picture.float().mul(255).round_().clamp_(0, 255).to(torch.uint8)
        return np.array(picture.cpu().numpy(), order="C")

    def order(self, fps: float) -> list[int]:
        """Which frame is shown at each output index, by the rule that holds for files."""
        rate, wanted = (Fraction(each).limit_denominator(1001) for each in (self.fps, fps))
        begins = [on_grid(index / rate, wanted) for index in range(len(self) + 1)]
        shown = [
            index for index in range(len(self)) for _ in range(begins[index], begins[index + 1])
        ]
        return shown or [len(self) - 1]

    def key(self) -> str:
        """A hash of the content."""
        digest = hashlib.blake2b(f"{self.fps} {tuple(self._frames.shape)}".encode(), digest_size=16)
        for index in range(len(self)):
            digest.update(self[index].data)
        return digest.hexdigest()

    def play(self, count: int, fps: float) -> Iterator[tuple[int, Frame]]:
        """Forward, backward, forward and so on, as :class:`PingPongReader` does."""
        order = self.order(fps)
        steps = (range(len(order)), range(len(order) - 1, -1, -1))
        endless = (index for turn in iter(lambda: steps, None) for way in turn for index in way)
        for index in islice(endless, count):
            yield index, self[order[index]]


class SoundArray:
    """Samples in memory as a sound.

    Args:
        samples: (n,) or (channels, n), floating point in [-1, 1], on any device.
        sample_rate: samples per second.

    Raises:
        MediaError: there is no sample.
        OptionError: another shape or type, or a rate that is none.
    """

    def __init__(self, samples: Tensor | npt.NDArray[Any], sample_rate: int) -> None:
        given = torch.from_numpy(samples) if isinstance(samples, np.ndarray) else samples
        if given.ndim not in (1, 2) or not given.dtype.is_floating_point:
            raise OptionError(
                "samples must be (n,) or (channels, n), floating point in [-1, 1], "
                f"not {tuple(given.shape)} {str(given.dtype).removeprefix('torch.')}"
            )
        if not isinstance(sample_rate, int) or sample_rate < 1:
            raise OptionError(f"sample_rate must be a positive whole number, not {sample_rate!r}")
        self._samples = given if given.ndim == 2 else given[None]
        self.sample_rate = sample_rate
        if not given.numel():
            raise MediaError(f"{self}: is empty; there is nothing to sync to")

    def __str__(self) -> str:
        return "sound in memory"

    def mono(self, sample_rate: int) -> Samples:
        """All channels mixed, (n,) float32 at another rate.

        Raises:
            MediaError: a sample is no finite number.
        """
        mixed = self._samples.float().mean(dim=0).cpu().numpy()
        if not np.isfinite(mixed).all():
            raise MediaError(f"{self}: holds samples that are no finite numbers")
        return resample(mixed, self.sample_rate, sample_rate)


# What a clip and a sound may be given as.
ClipSource: TypeAlias = str | Path | FrameArray
SoundSource: TypeAlias = str | Path | FrameArray | SoundArray


def play(source: ClipSource, count: int, fps: float) -> Iterable[tuple[int, Frame]]:
    """`count` frames of a clip, back and forth, with their index in it."""
    if isinstance(source, FrameArray):
        return source.play(count, fps)
    return PingPongReader(source, count, fps)


def length(source: ClipSource, fps: float, *, most: int | None = None) -> int:
    """How many frames a clip has at a rate, up to `most`: damaged time stamps may mean years."""
    if isinstance(source, FrameArray):
        return len(source.order(fps)[:most])
    return count_frames(source, fps, most=most)


def hear(source: SoundSource, sample_rate: int) -> Samples:
    """A sound in one channel, (n,) float32.

    Raises:
        MediaError: see :func:`load_audio`; frames in memory have no sound.
    """
    if isinstance(source, SoundArray):
        return source.mono(sample_rate)
    if isinstance(source, FrameArray):
        raise MediaError(f"{source}: has no sound of its own; give the speech too")
    return load_audio(source, sample_rate=sample_rate)

"""A request to the pipeline, checked, and what comes out of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from numpy.typing import NDArray
from torch import Tensor

from lsync_compile.errors import OptionError
from lsync_compile.media.faces import Frame
from lsync_compile.media.sources import ClipSource
from lsync_compile.media.tracking import FaceTracker
from lsync_compile.report import Session
from lsync_compile.runtime.timeline import Timeline

SAMPLE_RATE = 16_000  # Hz; what the audio encoders are trained on
StepCallback = Callable[[int, Any, Tensor], None]
ProgressCallback = Callable[[int, int], None]


@dataclass
class ChunkResult:
    """One finished chunk of f output frames.

    Attributes:
        index: position of the chunk in the output.
        frame_indices: f output frame numbers.
        total: output frames of the whole run.
        original: f pictures of the clip, (H, W, 3) uint8 RGB.
        faces: (f, 3, R, R) uint8, aligned faces of the clip; None if no frame shows a face.
        synced: (f, 3, R, R) in [-1, 1], generated faces with the surroundings pasted back.
        frames: f finished pictures, (H, W, 3) uint8 RGB.
        has_face: whether each frame shows a usable face; the others are passed through.
        seconds: wall time of the chunk, decoding of the clip included.
    """

    index: int
    frame_indices: list[int]
    total: int
    original: list[Frame]
    faces: Tensor | None
    synced: Tensor | None
    frames: list[Frame]
    has_face: list[bool]
    seconds: float


@dataclass
class LipsyncOutput(BaseOutput):
    """What a finished run wrote.

    Attributes:
        video_path: the written file.
        num_frames: frames written.
        missing_faces: output frames without a usable face, passed through unchanged.
        seconds: wall time from the first read to the finished file.
    """

    video_path: str
    num_frames: int
    missing_faces: int
    seconds: float


@dataclass(frozen=True)
class Job:
    """A checked request: what to read, how to denoise, whom to tell."""

    video_path: ClipSource
    sound: NDArray[np.float32]  # (n,), 16 kHz
    count: int  # output frames
    fps: int
    num_frames: int  # frames a chunk
    num_inference_steps: int
    guidance_scale: float
    eta: float
    mask: Tensor  # (1, R, R), 1 = kept
    generator: torch.Generator | None
    callback: StepCallback | None
    callback_steps: int
    progress: ProgressCallback | None
    tracker: FaceTracker
    session: Session | None = None  # of the compiled pipeline; None runs as the arguments say
    timeline: Timeline = field(default_factory=Timeline)

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0

    @property
    def chunks(self) -> int:
        return math.ceil(self.count / self.num_frames)


def check_counts(**counts: int) -> None:
    """Refuse anything but positive whole numbers.

    Raises:
        OptionError: names the first argument that is none.
    """
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise OptionError(f"{name} must be a positive whole number, not {value!r}")


def check_numbers(**numbers: float) -> None:
    """Refuse what is no finite number.

    Raises:
        OptionError: names the first argument that is none.
    """
    for name, value in numbers.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise OptionError(f"{name} must be a finite number, not {value!r}")


def check_resolution(height: int, width: int, multiple: int) -> int:
    """The side of the aligned square for the original's two arguments.

    Raises:
        OptionError: the two differ, or are no multiple of the VAE's reduction.
    """
    if height != width:
        raise OptionError(f"height and width must be equal, not {height} and {width}")
    if height <= 0 or height % multiple:
        raise OptionError(f"height must be a positive multiple of {multiple}, not {height}")
    return height


def check_chunk_length(num_frames: int, longest: int | None) -> None:
    """Refuse chunks that are longer than the UNet's temporal encoding; None has no limit.

    Raises:
        OptionError: names the longest chunk that works.
    """
    if longest is not None and num_frames > longest:
        raise OptionError(
            f"num_frames={num_frames} is more than the {longest} positions of the UNet's "
            f"temporal encoding; use {longest} or fewer"
        )


def check_compatibility_arguments(
    audio_sample_rate: int, weight_dtype: torch.dtype | None, dtype: torch.dtype
) -> None:
    """Refuse values of the original's arguments that would change nothing but seem to.

    Raises:
        OptionError: says what to do instead.
    """
    if audio_sample_rate != SAMPLE_RATE:
        raise OptionError(
            f"audio_sample_rate must be {SAMPLE_RATE}, which the audio encoders are trained "
            f"for, not {audio_sample_rate}; files of any rate are resampled"
        )
    if weight_dtype not in (None, dtype):
        raise OptionError(
            f"weight_dtype={weight_dtype} differs from the UNet's {dtype}; "
            "convert the pipeline with .to(dtype) instead"
        )

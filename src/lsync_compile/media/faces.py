"""What a face detector gives, and which face of a frame counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from lsync_compile.errors import OptionError

Frame = npt.NDArray[np.uint8]
Points = npt.NDArray[np.float64]

DETECTORS = ("mtcnn", "insightface")

# LatentSync's limits are 50 x 80 pixels; a picture whose short side is below 400 pixels gets them
# in proportion, so that a 256 x 256 clip of a face works.
_MIN_WIDTH, _MIN_HEIGHT = 50, 80
_FULL_LIMITS_FROM = 400
_MIN_ASPECT, _MAX_ASPECT = 0.2, 1.5


@dataclass(frozen=True, eq=False)
class Face:
    """One face in a frame. All positions are x, y in pixels.

    Attributes:
        box: (4,) left, top, right, bottom; may reach beyond the frame.
        points: (5, 2) left eye, right eye, tip of the nose, left and right corner of the mouth,
            left and right as seen in the picture.
        landmarks: (3, 2) centre of the left brow, of the right brow, and of the nose: what the
            alignment uses.
        score: the detector's confidence in [0, 1].
    """

    box: Points
    points: Points
    landmarks: Points
    score: float


class FaceDetector(Protocol):
    """Finds the face to work on.

    An instance may be used by one thread at a time; give each thread its own.
    """

    def detect(self, frame: Frame) -> Face | None:
        """The largest usable face of an RGB frame (H, W, 3) uint8, or None."""
        ...


@runtime_checkable
class BatchDetector(FaceDetector, Protocol):
    """A detector that looks at several frames at a time faster than at one after the other."""

    def detect_all(self, frames: Sequence[Frame]) -> list[Face | None]:
        """What `detect` gives for each of the frames."""
        ...


@runtime_checkable
class TrackingDetector(FaceDetector, Protocol):
    """A detector that can also follow a face."""

    def track(self, frame: Frame, last: Face) -> Face | None:
        """The face that was at `last` a frame ago; None where it is not surely there."""
        ...


def detect_all(detector: FaceDetector, frames: Sequence[Frame]) -> list[Face | None]:
    """What `detector.detect` gives for each of the frames, at once where it can do that."""
    if isinstance(detector, BatchDetector):
        return detector.detect_all(frames)
    return [detector.detect(frame) for frame in frames]


def create_detector(name: str = "mtcnn") -> FaceDetector:
    """A detector by name: ``"mtcnn"`` (no download, any machine) or ``"insightface"`` (extra).

    Raises:
        OptionError: the name is unknown, or its package is not installed.
    """
    # Imported here: insightface is an extra, and both are slow to import.
    if name == "mtcnn":
        from lsync_compile.media.mtcnn import MtcnnDetector

        return MtcnnDetector()
    if name == "insightface":
        from lsync_compile.media.insightface import InsightFaceDetector

        return InsightFaceDetector()
    raise OptionError(f"unknown face detector {name!r}: use one of {', '.join(DETECTORS)}")


def usable(faces: Iterable[Face], height: int, width: int) -> list[Face]:
    """The faces of a usable size and shape, largest box first.

    Args:
        faces: the faces of one frame.
        height: the frame's height in pixels.
        width: the frame's width in pixels.
    """
    limit = min(1.0, min(height, width) / _FULL_LIMITS_FROM)

    def fits(face: Face) -> bool:
        w, h = face.box[2:] - face.box[:2]
        return bool(
            w >= _MIN_WIDTH * limit
            and h >= _MIN_HEIGHT * limit
            and _MIN_ASPECT <= w / h <= _MAX_ASPECT
        )

    return sorted(filter(fits, faces), key=lambda face: -np.prod(face.box[2:] - face.box[:2]))

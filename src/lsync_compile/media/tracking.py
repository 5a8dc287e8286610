"""From a video file to chunks of frames that each have a place for a face.

The clip is read once, frame by frame, and played back and forth where the sound is longer than the
clip. Every frame of the clip is detected and aligned on its first, forward showing; later showings
reuse its matrix, so a looped clip costs no second detection and its matrices do not depend on the
direction of play.

Of two people of about the same size, now one is the larger and now the other. The one of the frame
before is kept until the other is clearly larger or a cut takes it away.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from lsync_compile.errors import NoFaceError, OptionError
from lsync_compile.media.align import FaceAligner, crop_face
from lsync_compile.media.align_batch import BatchAligner
from lsync_compile.media.faces import Face, FaceDetector, Frame, TrackingDetector, detect_all
from lsync_compile.media.sources import ClipSource, play

Matrix = NDArray[np.float32]

# A face this share of its own size away from the last one is looked upon as another's, which must
# be this many times as large to be taken in its place.
_ELSEWHERE, _CLEARLY_LARGER = 0.5, 1.5


@dataclass
class Chunk:
    """Consecutive output frames that share one denoising run.

    Attributes:
        index: position of the chunk in the output, from 0.
        start: output index of its first frame.
        sources: position in the clip of each frame.
        frames: f pictures of shape (H, W, 3), uint8 RGB.
        matrices: f matrices of shape (2, 3), picture to aligned square; None without a face.
        faces: (f, 3, R, R) uint8, the aligned faces. A frame without a face borrows the nearest
            face of the chunk, so that temporal attention sees a plausible picture. None until
            :meth:`FaceTracker.place`, and for a chunk without any face.
        shown: position in the clip of the face that each row of ``faces`` shows.
    """

    index: int
    start: int
    sources: list[int]
    frames: list[Frame]
    matrices: list[Matrix | None]
    faces: torch.Tensor | None = None
    shown: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def has_face(self) -> list[bool]:
        """Whether each frame shows a usable face."""
        return [matrix is not None for matrix in self.matrices]


@dataclass
class FaceTracker:
    """Detects and aligns each frame of one clip once, in forward order.

    Args:
        detector: finds the face.
        resolution: side R of the aligned square in pixels.
        on_missing_face: ``"pass"`` leaves frames without a usable face as they are, ``"fail"``
            raises NoFaceError at the first one.
        batch: cuts the faces of a chunk together; without, they are cut frame by frame.
        faces: what is known of the clip's frames beforehand, by their position, None for no
            usable face; those that are looked at are added.

    Raises:
        OptionError: ``on_missing_face`` is something else.
    """

    detector: FaceDetector
    resolution: int
    on_missing_face: str = "pass"
    batch: BatchAligner | None = None
    faces: dict[int, Face | None] = field(default_factory=dict)
    _matrices: dict[int, Matrix | None] = field(default_factory=dict)
    _aligner: FaceAligner = field(init=False)
    _last: Face | None = None

    def __post_init__(self) -> None:
        if self.on_missing_face not in ("pass", "fail"):
            raise OptionError(
                f"on_missing_face must be 'pass' or 'fail', not {self.on_missing_face!r}"
            )
        self._aligner = FaceAligner(self.resolution)

    def matrix(self, source: int, frame: Frame) -> Matrix | None:
        """The alignment of frame ``source`` of the clip, or None if it shows no usable face."""
        if source not in self._matrices:
            if source not in self.faces:
                self._find({source: frame})
            face = self.faces[source]
            if face is None and self.on_missing_face == "fail":
                raise NoFaceError(
                    f"frame {source} of the clip shows no usable face; "
                    "use on_missing_face='pass' to leave such frames unchanged"
                )
            self._matrices[source] = None if face is None else self._aligner.matrix(face.landmarks)
        return self._matrices[source]

    def place(self, chunk: Chunk) -> Chunk:
        """Find, align and cut the faces of the next chunk; gives the same chunk."""
        self._find(
            {
                source: frame
                for source, frame in zip(chunk.sources, chunk.frames, strict=True)
                if source not in self._matrices and source not in self.faces
            }
        )
        chunk.matrices = [
            self.matrix(source, frame)
            for source, frame in zip(chunk.sources, chunk.frames, strict=True)
        ]
        faces = self._cut(chunk)
        if faces is not None:
            donors = [place for place in nearest_valid(chunk.has_face) if place is not None]
            order = sorted(set(donors))
            chunk.shown = [chunk.sources[donor] for donor in donors]
            chunk.faces = faces[[order.index(donor) for donor in donors]]
        return chunk

    def _find(self, frames: dict[int, Frame]) -> None:
        """Look for the face in frames of the clip, by their position, in forward order."""
        found = detect_all(self.detector, list(frames.values()))
        for (source, frame), face in zip(frames.items(), found, strict=True):
            last = self.faces.get(source - 1) or self._last
            self.faces[source] = face if last is None else self._same_person(frame, face, last)
            self._last = self.faces[source] or last

    def _same_person(self, frame: Frame, face: Face | None, last: Face) -> Face | None:
        """The face found, or the one that was at `last` if that is there too and about as large."""
        if face is None or not isinstance(self.detector, TrackingDetector):
            return face
        away = np.abs(face.points.mean(axis=0) - last.points.mean(axis=0))
        if (away < _ELSEWHERE * (last.box[2:] - last.box[:2])).all():
            return face
        kept = self.detector.track(frame, last)
        if kept is None or _area(face) > _CLEARLY_LARGER * _area(kept):
            return face
        return kept

    def _cut(self, chunk: Chunk) -> torch.Tensor | None:
        """The faces of the frames that have one, (n, 3, R, R) uint8."""
        pairs = [
            (frame, matrix)
            for frame, matrix in zip(chunk.frames, chunk.matrices, strict=True)
            if matrix is not None
        ]
        if not pairs:
            return None
        frames, matrices = zip(*pairs, strict=True)
        if self.batch is not None:
            return self.batch.crop(frames, matrices)
        cut = [crop_face(frame, matrix, self.resolution) for frame, matrix in pairs]
        return torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2)

    def check_found(self, video_path: ClipSource) -> None:
        """Called at the end of a clip.

        Raises:
            NoFaceError: none of the frames looked at shows a usable face.
        """
        if self.found == 0:
            raise NoFaceError(
                f"{video_path}: no usable face in any of the {self.missing} frames looked at; "
                "use a clip whose face is upright, unobstructed and at least 50 pixels wide"
            )

    @property
    def missing(self) -> int:
        """How many frames of the clip were seen and show no usable face."""
        return sum(matrix is None for matrix in self._matrices.values())

    @property
    def found(self) -> int:
        """How many frames of the clip were seen and show a usable face."""
        return len(self._matrices) - self.missing


def _area(face: Face) -> float:
    """Of its box, in pixels."""
    return float(np.prod(face.box[2:] - face.box[:2]))


def read_chunks(
    video_path: ClipSource, count: int, num_frames: int, fps: int, tracker: FaceTracker
) -> Iterator[Chunk]:
    """Yield the ``count`` output frames of a clip as chunks of ``num_frames``; the last is short.

    Memory holds one chunk of pictures at a time, whatever the length of the clip.

    Raises:
        NoFaceError: the whole clip, or all of it that is used, shows no usable face.
        MediaError: the file cannot be read.
    """
    for chunk in cut_chunks(video_path, count, num_frames, fps):
        yield tracker.place(chunk)
    tracker.check_found(video_path)


def cut_chunks(video_path: ClipSource, count: int, num_frames: int, fps: int) -> Iterator[Chunk]:
    """As :func:`read_chunks`, with pictures only; :meth:`FaceTracker.place` does the rest.

    Raises:
        MediaError: the file cannot be read.
    """
    chunk = Chunk(0, 0, [], [], [])
    for position, (source, frame) in enumerate(play(video_path, count, fps)):
        chunk.sources.append(source)
        chunk.frames.append(frame)
        if len(chunk) == num_frames or position == count - 1:
            yield chunk
            chunk = Chunk(chunk.index + 1, position + 1, [], [], [])


def nearest_valid(valid: list[bool]) -> list[int | None]:
    """For each position the nearest position that is valid (the earlier of two), else None."""
    places = [place for place, ok in enumerate(valid) if ok]
    return [
        min(places, key=lambda place: (abs(place - position), place)) if places else None
        for position in range(len(valid))
    ]

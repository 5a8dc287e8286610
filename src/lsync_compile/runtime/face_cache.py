"""A face detector that does not search a frame for what it knows already.

Three ways around a search, surest first; each can be switched off, and a search is what remains.

1. **Exact hits.** Equal frames have equal faces. Held and repeated pictures (a 24 frames/s film
   read at 25, a still portrait as a clip) are recognised by a key of all their bytes.
2. **Near hits**, with a tolerance in landmark pixels. A perceptual hash (difference hash of 64
   bits) finds the remembered frames that look alike. It cannot tell how far a face has moved, so
   the motion of brows and nose against the best of them is measured by optical flow, there and
   back (Lucas and Kanade 1981); its landmarks are taken only if nine points of ten have moved by
   less than the tolerance.
3. **Tracking.** The face is looked for where it was in the frame before, which spares the search
   but not the careful look at the end of it. A cut, by the hash, ends it.

Every `refresh` frames the frame is searched all the same, and what 2 or 3 gave is compared with
what the search finds: the largest difference is counted in pixels, so a wrong hit shows.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import cv2
import numpy as np
import numpy.typing as npt

from lsync_compile.media.faces import Face, FaceDetector, Frame, TrackingDetector, detect_all

# Bits of 64 by which frames that look alike may differ; a cut differs by 20 and more.
_ALIKE = 10
_PATCH = 128  # side of the remembered face, pixels
_PATCH_REACH = 1.7  # half of its side in units of the face's own span
_DIFFERENT = 16.0  # mean difference of two patches, grey levels, above which flow is not tried
_SURE = 0.9  # share of points that must agree
# A tracked or near face that is off by this share of the distance between the eyes is wrong.
_WRONG = 0.08
_WORDS = 512
_WEIGHTS = np.random.default_rng(0).integers(0, 2**63, _WORDS, dtype=np.uint64) * 2 + 1

Patch = npt.NDArray[np.uint8]


@dataclass
class FaceCounts:
    """What became of the frames of a run.

    Attributes:
        frames: asked for.
        exact, near, tracked: spared a search, in the three ways.
        searched: not spared.
        checked: searched though a near or tracked face was at hand.
        wrong: of those, how many were off by more than 8 % of the distance between the eyes.
        worst_px: the largest landmark error of those checked, in pixels.
    """

    frames: int = 0
    exact: int = 0
    near: int = 0
    tracked: int = 0
    searched: int = 0
    checked: int = 0
    wrong: int = 0
    worst_px: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """Counters by name."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class _Known:
    """A frame that was looked at."""

    bits: int
    face: Face | None
    patch: Patch | None


class CachedFaceDetector:
    """Wraps a detector for one run over one clip; see the module for what it spares.

    Args:
        detector: finds faces; `tracking` needs one with a `track` method and does without else.
        capacity: how many frames are remembered, the least recently used is forgotten.
        tolerance: by how many pixels a near hit's landmarks may be off; 0 allows exact hits only.
        tracking: whether to follow the face from frame to frame.
        refresh: after how many frames without a search one is made anyway.

    Attributes:
        counts: what became of the frames so far.
    """

    def __init__(
        self,
        detector: FaceDetector,
        *,
        capacity: int = 100,
        tolerance: float = 0.0,
        tracking: bool = False,
        refresh: int = 25,
    ) -> None:
        self.counts = FaceCounts()
        self._detector = detector
        self._tracker = detector if tracking and isinstance(detector, TrackingDetector) else None
        self._capacity = capacity
        self._tolerance = tolerance
        self._refresh = refresh
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._last: _Known | None = None
        self._unsearched = 0

    def detect(self, frame: Frame) -> Face | None:
        """The largest usable face of an RGB frame (H, W, 3) uint8, or None."""
        return self._detect(frame, exact_key(frame), {})

    def detect_all(self, frames: Sequence[Frame]) -> list[Face | None]:
        """What `detect` gives for each frame; searches that are sure to come are made together."""
        keys = [exact_key(frame) for frame in frames]
        ahead: dict[bytes, Face | None] = {}
        # A near hit or a tracking depends on the frame before.
        if self._tolerance == 0 and self._tracker is None:
            new = {
                key: frame
                for key, frame in zip(keys, frames, strict=True)
                if key not in self._known
            }
            found = detect_all(self._detector, list(new.values()))
            ahead = dict(zip(new, found, strict=True))
        return [self._detect(frame, key, ahead) for key, frame in zip(keys, frames, strict=True)]

    def track(self, frame: Frame, last: Face) -> Face | None:
        """The face that was at `last` a frame ago, where the detector can tell; nothing is kept."""
        detector = self._detector
        return detector.track(frame, last) if isinstance(detector, TrackingDetector) else None

    def _detect(self, frame: Frame, key: bytes, ahead: dict[bytes, Face | None]) -> Face | None:
        """The face of a frame, with searches that were made ahead by its key."""
        self.counts.frames += 1
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            self.counts.exact += 1
            self._last = known
            return known.face
        approximate = self._tolerance > 0 or self._tracker is not None
        bits = perceptual_hash(frame) if approximate else 0
        face, kind = self._without_search(frame, bits) if approximate else (None, "")
        if face is None or self._unsearched >= self._refresh:
            found = ahead[key] if key in ahead else self._detector.detect(frame)
            self._check(face, found)
            face, kind = found, "searched"
            self._unsearched = 0
        else:
            self._unsearched += 1
        setattr(self.counts, kind, getattr(self.counts, kind) + 1)
        self._last = _Known(bits, face, self._patch_of(frame, face))
        # Near faces are not remembered: errors would add up from one to the next.
        if kind != "near":
            self._known[key] = self._last
            if len(self._known) > self._capacity:
                self._known.popitem(last=False)
        return face

    def _without_search(self, frame: Frame, bits: int) -> tuple[Face | None, str]:
        near = self._near(frame, bits) if self._tolerance > 0 else None
        if near is not None:
            return near, "near"
        last = self._last
        if self._tracker is None or last is None or last.face is None:
            return None, ""
        if (last.bits ^ bits).bit_count() > _ALIKE:
            return None, ""
        return self._tracker.track(frame, last.face), "tracked"

    def _near(self, frame: Frame, bits: int) -> Face | None:
        """The face of the remembered frame most alike, if the face has not moved since."""
        alike = [
            known
            for known in reversed(self._known.values())
            if known.patch is not None and (known.bits ^ bits).bit_count() <= _ALIKE
        ]
        if not alike:
            return None
        best = min(alike, key=lambda known: (known.bits ^ bits).bit_count())
        assert best.face is not None
        assert best.patch is not None
        square = _square(best.face)
        moved = motion(best.patch, cut_patch(frame, square))
        scale = (square[2] - square[0]) / _PATCH
        return best.face if moved * scale <= self._tolerance else None

    def _patch_of(self, frame: Frame, face: Face | None) -> Patch | None:
        return cut_patch(frame, _square(face)) if self._tolerance > 0 and face else None

    def _check(self, given: Face | None, found: Face | None) -> None:
        """Compare a face that was at hand with what the search found."""
        if given is None:
            return
        self.counts.checked += 1
        if found is None:
            self.counts.wrong += 1
            return
        error = landmark_error(given, found)
        self.counts.worst_px = max(self.counts.worst_px, error)
        eyes = float(np.linalg.norm(found.points[1] - found.points[0]))
        if error > _WRONG * eyes:
            self.counts.wrong += 1
            self._known.clear()


def landmark_error(one: Face, other: Face) -> float:
    """The largest distance in pixels between the alignment points of two faces."""
    return float(np.linalg.norm(one.landmarks - other.landmarks, axis=1).max())


def exact_key(frame: Frame) -> bytes:
    """16 bytes that differ for frames that differ; about a millisecond at 1080 x 1920.

    The frame's bytes are summed in blocks of 64-bit words, each word times an odd number of its
    own place, modulo 2^64; a change of one word always changes its block's sum. The sums, the
    bytes left over and the shape go through a cryptographic hash.
    """
    data = np.ascontiguousarray(frame).reshape(-1)
    whole = len(data) // (8 * _WORDS) * 8 * _WORDS
    sums = data[:whole].view(np.uint64).reshape(-1, _WORDS) @ _WEIGHTS
    digest = hashlib.blake2b(sums.tobytes(), digest_size=16)
    digest.update(data[whole:].tobytes())
    digest.update(repr(frame.shape).encode())
    return digest.digest()


def perceptual_hash(frame: Frame) -> int:
    """64 bits: which of 8 x 8 places are brighter than their right neighbours."""
    # Every fourth pixel is plenty for means over an eighth of the picture.
    step = max(1, min(frame.shape[:2]) // 256)
    small = cv2.resize(frame[::step, ::step], (9, 8), interpolation=cv2.INTER_AREA)
    grey = small.astype(np.int32).sum(axis=-1)
    return int.from_bytes(np.packbits(grey[:, 1:] < grey[:, :-1]).tobytes(), "big")


def _square(face: Face) -> tuple[int, int, int, int]:
    """A square around eyes, brows and nose: left, top, right, bottom in whole pixels."""
    eyes, lips = face.points[:2].mean(axis=0), face.points[3:].mean(axis=0)
    span = max(np.linalg.norm(lips - eyes), np.linalg.norm(face.points[1] - face.points[0]))
    half = max(8, round(_PATCH_REACH * float(span)))
    x, y = ((eyes + face.points[2]) / 2).round().astype(int)
    return int(x) - half, int(y) - half, int(x) + half, int(y) + half


def cut_patch(frame: Frame, square: tuple[int, int, int, int]) -> Patch:
    """A square of a frame in grey, (128, 128) uint8; black outside the frame."""
    x0, y0, x1, y1 = square
    part = frame[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)]
    if part.shape[:2] != (y1 - y0, x1 - x0):
        padded = np.zeros((y1 - y0, x1 - x0, 3), dtype=np.uint8)
        top, left = min(max(-y0, 0), y1 - y0), min(max(-x0, 0), x1 - x0)
        padded[top : top + part.shape[0], left : left + part.shape[1]] = part
        part = padded
    small = cv2.resize(part, (_PATCH, _PATCH), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), dtype=np.uint8)


def motion(before: Patch, after: Patch) -> float:
    """How far nine of ten points around brows and nose have moved, in patch pixels.

    Infinite where the patches do not show the same thing: the mouth may move, the rest may not.
    """
    upper = slice(0, round(0.62 * _PATCH))
    if np.abs(before[upper].astype(np.int16) - after[upper]).mean() > _DIFFERENT:
        return float("inf")
    x, y = np.meshgrid(np.linspace(0.25, 0.75, 9), np.linspace(0.25, 0.62, 8))
    points = (np.stack([x, y], axis=-1).reshape(-1, 1, 2) * _PATCH).astype(np.float32)
    there, back = np.empty_like(points), np.empty_like(points)
    window, levels = (15, 15), 2
    there, found, _ = cv2.calcOpticalFlowPyrLK(
        before, after, points, there, winSize=window, maxLevel=levels
    )
    back, returned, _ = cv2.calcOpticalFlowPyrLK(
        after, before, there, back, winSize=window, maxLevel=levels
    )
    returns = np.linalg.norm(back - points, axis=-1).ravel() < 0.5
    sure = (found.ravel() == 1) & (returned.ravel() == 1) & returns
    moved = np.where(sure, np.linalg.norm(there - points, axis=-1).ravel(), np.inf)
    return float(np.sort(moved)[int(_SURE * len(moved))])

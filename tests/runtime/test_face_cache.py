"""The detector's cache: what it recognises, what it must not, and that errors show."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest

from lsync_compile.media.faces import Face, Frame
from lsync_compile.media.mtcnn import MtcnnDetector
from lsync_compile.media.video import read_frames
from lsync_compile.runtime.face_cache import (
    CachedFaceDetector,
    exact_key,
    landmark_error,
    motion,
    perceptual_hash,
)


def scene(seed: int = 0, shift: int = 0, height: int = 240, width: int = 320) -> Frame:
    """A soft texture over broad shapes, moved to the left by `shift` pixels."""
    return np.ascontiguousarray(texture(seed, height, width + 64)[:, shift : shift + width])


@cache
def texture(seed: int, height: int, width: int) -> Frame:
    draw = np.random.default_rng(seed)
    wide = (height, width, 3)
    fine = cv2.GaussianBlur(draw.normal(0, 1, wide), (0, 0), 3)
    broad = cv2.GaussianBlur(draw.normal(0, 1, wide), (0, 0), 30)
    picture = 128 + 25 * fine / fine.std() + 35 * broad / broad.std()
    return picture.clip(0, 255).astype(np.uint8)


class Moving:
    """Finds a face at a place that the test sets; counts searches and trackings."""

    def __init__(self) -> None:
        self.x = 160.0
        self.searches = self.trackings = 0
        self.off = 0.0  # error of tracking, in pixels

    def detect(self, frame: Frame) -> Face | None:
        self.searches += 1
        return None if frame.max() < 32 else self._face(0.0)

    def track(self, frame: Frame, last: Face) -> Face | None:
        self.trackings += 1
        return None if frame.max() < 32 else self._face(self.off)

    def _face(self, off: float) -> Face:
        centre = np.array([self.x + off, 110.0])
        points = centre + np.array(
            [[-20.0, -10.0], [20.0, -10.0], [0.0, 10.0], [-14.0, 28.0], [14.0, 28.0]]
        )
        landmarks = centre + np.array([[-20.0, -22.0], [20.0, -22.0], [0.0, 8.0]])
        box = np.array([*(centre - 40), *(centre + 50)])
        return Face(box, points, landmarks, 0.99)


def test_equal_frames_are_searched_once_even_in_another_array() -> None:
    detector = Moving()
    cached = CachedFaceDetector(detector)
    first = cached.detect(scene())
    assert cached.detect(scene().copy()) is first
    assert detector.searches == 1
    assert (cached.counts.exact, cached.counts.searched) == (1, 1)


@pytest.mark.parametrize("place", [(0, 0, 0), (239, 319, 2), (100, 200, 1)])
def test_a_change_of_one_level_is_another_frame(place: tuple[int, int, int]) -> None:
    changed = scene()
    changed[place] ^= 1
    assert exact_key(changed) != exact_key(scene())


def test_frames_of_the_same_bytes_and_other_shapes_differ() -> None:
    flat = scene()
    assert exact_key(flat) != exact_key(flat.reshape(320, 240, 3))


def test_a_frame_without_a_face_is_remembered_too() -> None:
    detector = Moving()
    cached = CachedFaceDetector(detector)
    black = np.zeros((240, 320, 3), dtype=np.uint8)
    assert cached.detect(black) is None
    assert cached.detect(black) is None
    assert detector.searches == 1


def test_the_least_recently_used_frame_is_forgotten() -> None:
    detector = Moving()
    cached = CachedFaceDetector(detector, capacity=2)
    frames = [scene(seed) for seed in range(3)]
    for frame in (frames[0], frames[1], frames[0], frames[2], frames[0]):
        cached.detect(frame)
    assert detector.searches == 3
    cached.detect(frames[1])
    assert detector.searches == 4


def test_near_hits_stay_within_the_tolerance() -> None:
    """Noise is a near hit, a moved face is none, however alike the frames' hashes are."""
    detector = Moving()
    cached = CachedFaceDetector(detector, tolerance=1.0)
    first = cached.detect(scene())
    noise = np.random.default_rng(1).integers(-2, 3, scene().shape)
    assert cached.detect((scene().astype(int) + noise).clip(0, 255).astype(np.uint8)) is first
    moved = scene(shift=4)
    assert (perceptual_hash(moved) ^ perceptual_hash(scene())).bit_count() <= 10
    detector.x -= 4
    found = cached.detect(moved)
    assert found is not None
    assert found is not first
    assert (cached.counts.near, cached.counts.searched) == (1, 2)


def test_near_hits_do_not_drift() -> None:
    """A slow pan in steps below the tolerance: each hit is measured against a search."""
    detector = Moving()
    cached = CachedFaceDetector(detector, tolerance=2.5, refresh=1000)
    errors = []
    for step in range(16):
        detector.x = 160.0 - step
        found, truth = cached.detect(scene(shift=step)), detector._face(0.0)
        assert found is not None
        errors.append(landmark_error(found, truth))
    assert cached.counts.near > 4
    assert max(errors) <= 3


def test_motion_is_measured_in_pixels() -> None:
    patch = scene(height=160, width=160)[..., 1]
    for distance in (0, 1, 3):
        found = motion(
            patch[16:144, 16:144].copy(), patch[16:144, 16 - distance : 144 - distance].copy()
        )
        assert found == pytest.approx(distance, abs=0.25)
    other = scene(seed=5, height=128, width=128)[..., 1]
    assert motion(patch[:128, :128].copy(), other) == float("inf")


def test_tracking_spares_searches_until_a_cut_or_the_next_check() -> None:
    detector = Moving()
    cached = CachedFaceDetector(detector, tracking=True, refresh=4)
    for step in range(5):
        cached.detect(scene(shift=step))
    assert (cached.counts.tracked, cached.counts.searched) == (4, 1)
    cached.detect(scene(shift=5))  # the check
    assert (cached.counts.checked, cached.counts.searched) == (1, 2)
    before = detector.trackings
    cached.detect(scene(seed=9))  # a cut
    assert detector.trackings == before
    assert cached.counts.searched == 3


def test_a_wrong_face_shows_and_is_not_kept() -> None:
    detector = Moving()
    detector.off = 12.0
    cached = CachedFaceDetector(detector, tracking=True, refresh=3)
    for step in range(8):
        cached.detect(scene(shift=step))
    assert cached.counts.wrong == cached.counts.checked == 1
    assert cached.counts.worst_px == pytest.approx(12.0)
    calls = detector.searches + detector.trackings
    assert cached.detect(scene(shift=1)) is not None
    assert detector.searches + detector.trackings > calls  # looked at again


def test_a_detector_that_cannot_track_searches() -> None:
    class Plain:
        searches = 0

        def detect(self, frame: Frame) -> Face | None:
            self.searches += 1
            return None

    detector = Plain()
    cached = CachedFaceDetector(detector, tracking=True)
    for step in range(3):
        cached.detect(scene(shift=step))
    assert detector.searches == 3


def test_tracking_a_real_face_is_as_exact_as_detecting_it(shared: Path) -> None:
    """Within the detector's own noise: 1.1 % of the distance between the eyes."""
    frames = list(islice(read_frames(shared / "data/clips/demo1_video.mp4"), 8))
    detector = MtcnnDetector()
    cached = CachedFaceDetector(detector, tracking=True)
    for frame in frames:
        found, truth = cached.detect(frame), detector.detect(frame)
        assert found is not None
        assert truth is not None
        eyes = float(np.linalg.norm(truth.points[1] - truth.points[0]))
        assert landmark_error(found, truth) < 0.02 * eyes
    assert cached.counts.tracked == 7


def test_a_lost_face_is_not_tracked(shared: Path) -> None:
    (frame,) = islice(read_frames(shared / "data/clips/demo1_video.mp4"), 1)
    detector = MtcnnDetector()
    face = detector.detect(frame)
    assert face is not None
    elsewhere = dataclasses.replace(
        face, points=face.points + 350.0, landmarks=face.landmarks + 350.0
    )
    assert detector.track(frame, elsewhere) is None
    assert detector.track(frame[::-1].copy(), face) is None


def test_frames_of_a_chunk_are_searched_together_and_equal_ones_once() -> None:
    class Batch(Moving):
        asked: tuple[int, ...] = ()

        def detect_all(self, frames: Sequence[Frame]) -> list[Face | None]:
            self.asked += (len(frames),)
            return [self.detect(frame) for frame in frames]

    shown = [scene(), scene(shift=3), scene(), np.zeros_like(scene()), scene(shift=3)]
    detector = Batch()
    cached = CachedFaceDetector(detector)
    cached.detect(shown[1])
    faces = cached.detect_all(shown)
    assert detector.asked == (2,)
    assert faces[0] is faces[2]
    assert faces[1] is faces[4]
    assert faces[3] is None
    assert (cached.counts.frames, cached.counts.exact, cached.counts.searched) == (6, 3, 3)
    # As one after the other, whatever is forgotten meanwhile.
    few = CachedFaceDetector(Batch(), capacity=1)
    assert [face is None for face in few.detect_all(shown)] == [face is None for face in faces]
    # What depends on the frame before is not searched ahead.
    tracking = Batch()
    CachedFaceDetector(tracking, tracking=True).detect_all(shown[:2])
    assert (tracking.asked, tracking.trackings) == ((), 1)

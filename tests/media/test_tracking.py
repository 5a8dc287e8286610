"""Chunks of a clip: what each frame sees where a face is missing, and who is asked for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lsync_compile.errors import NoFaceError, OptionError
from lsync_compile.media.faces import Face, FaceDetector, Frame
from lsync_compile.media.tracking import FaceTracker, nearest_valid, read_chunks
from lsync_compile.runtime.face_cache import CachedFaceDetector

Maker = Callable[..., Path]


@pytest.mark.parametrize(
    ("valid", "nearest"),
    [
        ([True, True], [0, 1]),
        ([False, True, False, False, True], [1, 1, 1, 4, 4]),
        ([True, False, True], [0, 0, 2]),  # of two equally near, the earlier
        ([False, False], [None, None]),
        ([], []),
    ],
)
def test_nearest_valid(valid: list[bool], nearest: list[int | None]) -> None:
    assert nearest_valid(valid) == nearest


def test_matrices_do_not_depend_on_the_direction_of_play(
    make_clip: Maker, middle_face: FaceDetector
) -> None:
    tracker = FaceTracker(middle_face, 64)
    chunks = list(read_chunks(make_clip(5), 12, 4, 25, tracker))
    matrices = {}
    for chunk in chunks:
        for source, matrix in zip(chunk.sources, chunk.matrices, strict=True):
            assert matrix is not None
            np.testing.assert_array_equal(matrices.setdefault(source, matrix), matrix)
    assert [len(chunk) for chunk in chunks] == [4, 4, 4]
    assert tracker.found == 5


def test_a_face_missing_at_the_start_borrows_the_first_one(
    make_clip: Maker, middle_face: FaceDetector
) -> None:
    tracker = FaceTracker(middle_face, 64)
    (chunk,) = read_chunks(make_clip(4, black=(0, 1)), 4, 16, 25, tracker)
    assert chunk.has_face == [False, False, True, True]
    assert chunk.faces is not None
    np.testing.assert_array_equal(chunk.faces[0], chunk.faces[2])
    assert tracker.missing == 2


def test_a_clip_without_any_face_is_refused_at_its_end(
    make_clip: Maker, middle_face: FaceDetector
) -> None:
    tracker = FaceTracker(middle_face, 64)
    with pytest.raises(NoFaceError, match="in any of the 3 frames"):
        list(read_chunks(make_clip(3, black=(0, 1, 2)), 6, 2, 25, tracker))


def test_unknown_treatment_of_missing_faces(middle_face: FaceDetector) -> None:
    with pytest.raises(OptionError, match="'pass' or 'fail'"):
        FaceTracker(middle_face, 64, on_missing_face="drop")


class TwoPeople:
    """Two faces side by side; the size of the right one is the frame's first pixel, in tenths."""

    def __init__(self) -> None:
        self.gone: list[str] = []  # who has left the picture

    def faces(self, frame: Frame) -> dict[str, Face]:
        sizes = {"left": (100.0, 1.0), "right": (400.0, float(frame[0, 0, 0]) / 10)}
        shape = 20 * np.array([[-1.0, -1.0], [1.0, -1.0], [0.0, 0.3], [-0.8, 1.0], [0.8, 1.0]])
        found = {}
        for name, (x, size) in sizes.items():
            points = size * shape + np.array([x, 100.0])
            box = np.array([x - 50 * size, 100 - 60 * size, x + 50 * size, 100 + 60 * size])
            found[name] = Face(box, points, size * shape[:3] + np.array([x, 90.0]), 0.99)
        return {name: face for name, face in found.items() if name not in self.gone}

    def detect(self, frame: Frame) -> Face | None:
        faces = self.faces(frame).values()
        return max(
            faces, key=lambda face: float(np.prod(face.box[2:] - face.box[:2])), default=None
        )

    def track(self, frame: Frame, last: Face) -> Face | None:
        places = self.faces(frame).values()
        return next(
            (face for face in places if abs(face.points[2, 0] - last.points[2, 0]) < 20), None
        )


@pytest.mark.parametrize("cached", [False, True])
def test_of_two_people_the_same_one_is_kept_until_the_other_is_clearly_larger(cached: bool) -> None:
    people = TwoPeople()
    tracker = FaceTracker(CachedFaceDetector(people) if cached else people, 64)

    def who(*tenths: int) -> str:
        start = len(tracker.faces)
        for source, size in enumerate(tenths, start):
            tracker.matrix(source, np.full((200, 500, 3), size, dtype=np.uint8))
        faces = list(tracker.faces.values())[start:]
        return "".join(
            "-" if face is None else "LR"[int(face.points[2, 0] > 250)] for face in faces
        )

    assert who(9, 11, 10, 12, 8) == "LLLLL"
    assert who(13, 11, 9, 7, 9) == "RRRLL"  # 1.3 x 1.3 is more than 1.5 times the area
    people.gone = ["left"]
    assert who(6) == "R"
    people.gone = []
    assert who(9, 7) == "RL"


def test_a_detector_that_cannot_follow_decides_by_size() -> None:
    people = TwoPeople()
    tracker = FaceTracker(SimpleNamespace(detect=people.detect), 64)
    for source, size in enumerate((9, 11, 9)):
        tracker.matrix(source, np.full((200, 500, 3), size, dtype=np.uint8))
    assert [face.points[2, 0] > 250 for face in tracker.faces.values()] == [False, True, False]

"""Chunks of a clip: what each frame sees where a face is missing, and who is asked for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lsync_compile.errors import NoFaceError, OptionError
from lsync_compile.media.faces import FaceDetector
from lsync_compile.media.tracking import FaceTracker, nearest_valid, read_chunks

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

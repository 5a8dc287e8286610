"""Batched alignment against the original implementation and against single frames."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from lsync_compile.media.align import FaceAligner, crop_face, face_size, restore_face
from lsync_compile.media.align_batch import BatchAligner, blur, lanczos

CPU = torch.device("cpu")


def frames_and_matrices(
    count: int, resolution: int, seed: int = 0, spread: float = 40.0
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Textured frames, and faces of all angles around their middle."""
    draw = np.random.default_rng(seed)
    frames, matrices = [], []
    for _ in range(count):
        noise = draw.normal(128, 400, (360, 448, 3)).astype(np.float32)
        frames.append(cv2.GaussianBlur(noise, (0, 0), 4).clip(0, 255).astype(np.uint8))
        size, angle = draw.uniform(15, 40), draw.normal(0, 0.3)
        shape = size * np.array([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        centre = np.array([224, 160]) + draw.uniform(-spread, spread, 2)
        matrices.append(FaceAligner(resolution).matrix(shape @ turn.T + centre))
    return frames, matrices


def assert_within_rounding(ours: np.ndarray, theirs: np.ndarray, share: float) -> None:
    error = np.abs(ours.astype(int) - theirs.astype(int))
    assert error.max() <= 1
    assert (error > 0).mean() < share


@pytest.mark.parametrize("resolution", [64, 256])
def test_crops_are_those_of_single_frames(resolution: int) -> None:
    frames, matrices = frames_and_matrices(5, resolution)
    faces = BatchAligner(resolution, CPU, group=2).crop(frames, matrices)
    assert faces.shape == (5, 3, resolution, resolution)
    assert faces.dtype == torch.uint8
    for face, frame, matrix in zip(faces, frames, matrices, strict=True):
        expected = crop_face(frame, matrix, resolution)
        assert_within_rounding(face.permute(1, 2, 0).numpy(), expected, share=0.08)


@pytest.mark.parametrize(("resolution", "spread"), [(64, 40.0), (256, 40.0), (64, 250.0)])
def test_restored_frames_are_those_of_single_frames(resolution: int, spread: float) -> None:
    """Also for faces that are cut by the frame's edges or lie outside."""
    frames, matrices = frames_and_matrices(5, resolution, seed=1, spread=spread)
    faces = torch.rand(5, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))
    restored = BatchAligner(resolution, CPU, group=3).restore(frames, 2 * faces - 1, matrices)
    for ours, frame, face, matrix in zip(restored, frames, 2 * faces - 1, matrices, strict=True):
        assert_within_rounding(ours, restore_face(frame, face, matrix), share=0.004)
        assert not np.shares_memory(ours, frame)


def test_faces_outside_all_frames_change_nothing() -> None:
    frames, matrices = frames_and_matrices(2, 64)
    matrices = [matrix + np.float32([[0, 0, 1e5], [0, 0, 0]]) for matrix in matrices]
    aligner = BatchAligner(64, CPU)
    assert (aligner.crop(frames, matrices) == 127).all()
    for ours, frame in zip(
        aligner.restore(frames, torch.ones(2, 3, 64, 64), matrices), frames, strict=True
    ):
        np.testing.assert_array_equal(ours, frame)


def test_a_frames_result_does_not_depend_on_the_others() -> None:
    frames, matrices = frames_and_matrices(4, 64, seed=3, spread=120.0)
    faces = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    aligner = BatchAligner(64, CPU)
    together = aligner.restore(frames, faces, matrices)
    for place in range(4):
        here = slice(place, place + 1)
        (alone,) = aligner.restore(frames[here], faces[here], matrices[here])
        assert_within_rounding(alone, together[place], share=0.001)


def test_warped_and_restored_are_the_originals(shared: Path) -> None:
    original = np.load(shared / "data/upstream/alignment.npz")
    matrix = FaceAligner(512).matrix(original["warp_landmarks3"])
    aligner = BatchAligner(512, CPU)
    warped = aligner._warp([original["image"]], [matrix], face_size(512))
    warped_face = warped[0].permute(1, 2, 0).to(torch.uint8).numpy()
    assert_within_rounding(warped_face, original["warped_face"], share=0.02)
    square = torch.from_numpy(original["decoded_face"]).float()[None]
    (restored,) = aligner._paste([original["image"]], square, [matrix])
    assert_within_rounding(restored, original["restored"], share=0.002)


@pytest.mark.parametrize(("length", "side"), [(420, 512), (560, 512), (70, 64)])
def test_lanczos_is_opencvs(length: int, side: int) -> None:
    picture = np.random.default_rng(0).uniform(0, 1, (length, 3)).astype(np.float32)
    ours = lanczos(length, side, CPU).numpy() @ picture
    theirs = cv2.resize(picture, (3, side), interpolation=cv2.INTER_LANCZOS4)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize(("length", "edge"), [(100, 3), (40, 19), (9, 12)])
def test_blur_is_opencvs(length: int, edge: int) -> None:
    picture = np.random.default_rng(0).uniform(0, 1, (length, 5)).astype(np.float32)
    offsets = np.arange(-edge, edge + 1)
    weights = np.exp(-(offsets**2) / (2 * (0.3 * (edge - 1) + 0.8) ** 2))
    weights /= weights.sum()
    theirs = cv2.sepFilter2D(
        picture, cv2.CV_32F, np.ones(1), weights, borderType=cv2.BORDER_REFLECT_101
    )
    np.testing.assert_allclose(blur(length, edge, CPU).numpy() @ picture, theirs, atol=2e-6)


def test_edges_of_all_widths_are_softened_in_one_batch() -> None:
    """Faces of unlike sizes have soft edges of unlike widths."""
    frames, matrices = frames_and_matrices(3, 128, seed=4, spread=5.0)
    matrices = [np.float32([[scale, 0, -100], [0, scale, -60]]) for scale in (0.8, 1.5, 6.0)]
    faces = torch.zeros(3, 3, 128, 128)
    restored = BatchAligner(128, CPU).restore(frames, faces, matrices)
    for ours, frame, matrix in zip(restored, frames, matrices, strict=True):
        assert_within_rounding(ours, restore_face(frame, faces[0], matrix), share=0.004)

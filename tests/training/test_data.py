"""What `training.prepare` writes, `training.data` reads; the held-out part stays apart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from lsync_compile.media.faces import Face, Frame
from training import prepare
from training.data import MANIFEST, TrainingData, read_sound, write_sound
from training.prepare import Folder, Run, aligned_runs

FRAME = 640


def jpeg(value: int) -> bytes:
    picture = np.full((256, 256, 3), (value, 40, 90), np.uint8)
    return cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def test_clips_come_back_with_their_own_sound_and_split(tmp_path: Path) -> None:
    sound = torch.arange(20 * FRAME) / (20 * FRAME)
    folder = Folder(tmp_path)
    folder.add_clip("a/0", "real", Run(2, [jpeg(i * 10) for i in range(8)]), sound, 7)
    folder.add_clip("a/1", "real", Run(12, [jpeg(9)] * 4), sound, 7)
    folder.add_clip("b", "portrait", Run(0, [jpeg(9)] * 3), sound, 3)
    folder.add_speech("voice/x", sound, "test")
    folder.close()

    data = TrainingData(tmp_path)
    first, second, third = data.clips
    assert first.frames.shape == (8, 3, 256, 256)
    assert first.frames.dtype == torch.uint8
    means = first.frames[:, 0].float().mean((1, 2))
    assert torch.allclose(means, torch.arange(8) * 10.0, atol=2)
    # Frames 2 to 9 of the recording; 7 and later are held out.
    assert torch.allclose(first.sound, sound[2 * FRAME : 10 * FRAME], atol=1e-4)
    assert (first.train_frames, first.heldout) == (range(5), range(5, 8))
    assert (second.train_frames, second.heldout) == (range(0), range(4))
    assert (third.train_frames, len(third.heldout)) == (range(3), 0)
    assert torch.allclose(data.speech["voice/x"], sound, atol=1e-4)
    assert str(data).startswith("12 real frames (7 held out), 3 of portraits")


def test_sound_that_ends_early_is_followed_by_silence(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.add_clip("a", "real", Run(0, [jpeg(1)] * 4), torch.ones(FRAME), 3)
    folder.close()
    sound = TrainingData(tmp_path).clips[0].sound
    assert len(sound) == 4 * FRAME
    assert sound[:FRAME].min() > 0.99
    assert sound[FRAME:].abs().max() == 0


def test_sound_is_clipped_not_wrapped(tmp_path: Path) -> None:
    write_sound(tmp_path / "s.npz", torch.tensor([-1.5, 0.0, 1.5]))
    assert read_sound(tmp_path / "s.npz").tolist() == [-1, 0, 1]


def test_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"version": 0, "clips": [], "speech": []}))
    with pytest.raises(ValueError, match="version 0"):
        TrainingData(tmp_path)


class SeesBrightFrames:
    """Stands in for a detector: a face in every frame that is not black."""

    def detect(self, frame: Frame) -> Face | None:
        if frame.max() == 0:
            return None
        points = np.array([[40.0, 50], [88, 50], [64, 80], [45, 100], [83, 100]])
        return Face(np.array([20.0, 20, 108, 120]), points, points[:3], 1.0)


def test_a_frame_without_a_face_and_a_cut_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "MtcnnDetector", SeesBrightFrames)
    monkeypatch.setattr(prepare, "SHORTEST", 3)

    def frames() -> Iterator[Frame]:
        # Two grey frames are too short a run; then black; then a cut from 90 to 200.
        for value in (90, 90, 0, 90, 90, 90, 90, 200, 200, 200, 0):
            yield np.full((128, 128, 3), value, np.uint8)

    runs = [(run.first, len(run.faces)) for run in aligned_runs(frames(), label="test")]
    assert runs == [(3, 4), (7, 3)]

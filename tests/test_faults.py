"""What goes wrong in practice, in whole runs: each either works or ends with one clear error."""

from __future__ import annotations

import json
import resource
import sys
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lsync_compile
from lsync_compile import cli
from lsync_compile.errors import MediaError
from lsync_compile.media.align import FaceAligner
from lsync_compile.media.faces import Face
from lsync_compile.media.mtcnn import MtcnnDetector
from lsync_compile.media.tracking import FaceTracker
from lsync_compile.media.video import VideoWriter, read_frames
from lsync_compile.models.pipeline import LatentSyncPipeline

Maker = Callable[..., Path]
SAMPLE = Path(lsync_compile.__file__).parent / "assets" / "sample" / "talking.mp4"


@pytest.fixture
def stages(
    tiny_pipeline: LatentSyncPipeline, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """A function that gives the pipeline with overlapped stages and options; nothing compiles."""
    monkeypatch.setattr("lsync_compile.compiled.PipelineHandle.settle", lambda handle: None)

    def make(pipeline: Any = None, **options: Any) -> Any:
        options = {"preset": "exact", "lowering": "eager", "parallel_stages": "on", **options}
        return lsync_compile.compile(pipeline or tiny_pipeline, **options)

    return make


def pictures(pipeline: Any, clip: Path, speech: Path | None) -> np.ndarray:
    results = pipeline.synthesize(
        clip,
        speech,
        num_frames=4,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(3),
    )
    return np.stack([frame for result in results for frame in result.frames])


def threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("lsync")]


@pytest.mark.parametrize("temporal", ["off", "path"])
def test_a_face_that_leaves_and_comes_back(
    stages: Callable[..., Any],
    make_clip: Maker,
    make_speech: Maker,
    tmp_path: Path,
    temporal: str,
) -> None:
    """A whole chunk without a face and half of the next: passed through, the rest synced."""
    clip, speech = make_clip(16, black=(4, 5, 6, 7, 8)), make_speech(0.64)
    fast = stages(temporal_start=temporal)
    after = pictures(fast, clip, speech)
    before = np.stack(list(read_frames(clip)))
    changed = np.abs(after.astype(int) - before).max(axis=(1, 2, 3)) > 8
    assert changed.tolist() == [True] * 4 + [False] * 5 + [True] * 7
    result = fast(clip, speech, tmp_path / "out.mp4", num_frames=4, num_inference_steps=1)
    assert (result.num_frames, result.missing_faces) == (16, 5)
    # What comes after the gap does not depend on the gap.
    np.testing.assert_array_equal(pictures(stages(temporal_start=temporal), clip, speech), after)


def test_one_of_two_people_is_synced_and_the_other_left_alone(
    tiny_pipeline: LatentSyncPipeline, make_speech: Maker, tmp_path: Path
) -> None:
    """Two real faces of equal size, beside each other."""
    frames = list(islice(read_frames(SAMPLE), 14))
    clip = tmp_path / "two.mp4"
    with VideoWriter(clip, 768, 480, crf=1) as writer:
        for one, other in zip(frames[:8], frames[6:], strict=True):
            writer.write(np.hstack([one, other[:, ::-1]]))
    tiny_pipeline.detector = MtcnnDetector()
    before = np.stack(list(read_frames(clip))).astype(int)
    changed = np.abs(pictures(tiny_pipeline, clip, make_speech(0.32)) - before).max(axis=(1, 3)) > 8
    left, right = changed[:, :384].any(axis=1), changed[:, 384:].any(axis=1)
    assert (left.all() and not right.any()) or (right.all() and not left.any())


class Marked:
    """Finds a face at the place that the first pixels of a frame say."""

    def detect(self, frame: np.ndarray) -> Face:
        centre, unit = frame[0, :2, 0].astype(float) * 2, float(frame[0, 2, 0])
        landmarks = centre + unit * np.array([[-1.0, -1.2], [1.0, -1.2], [0.0, 0.2]])
        return Face(np.concatenate([centre - 2 * unit, centre + 2 * unit]), landmarks, landmarks, 1)


def test_after_a_scene_cut_the_face_is_cut_out_where_it_is_now() -> None:
    """The smoothing from frame to frame must not drag the square to the new place."""
    tracker = FaceTracker(Marked(), 512)
    for source, place in enumerate([(60, 80, 30), (61, 80, 30), (200, 90, 55), (200, 91, 55)]):
        frame = np.zeros((400, 600, 3), dtype=np.uint8)
        frame[0, :3, 0] = place
        matrix = tracker.matrix(source, frame)
        alone = FaceAligner(512).matrix(Marked().detect(frame).landmarks)
        face = np.array([*(2.0 * np.array(place[:2])), 1.0])
        assert matrix is not None
        assert np.abs(matrix @ face - alone @ face).max() < 0.5


def test_a_disk_that_fills_up_is_one_error_and_leaves_the_old_file(
    stages: Callable[..., Any], make_clip: Maker, make_speech: Maker, tmp_path: Path
) -> None:
    """Writing fails in the middle of the film, as the system says it."""
    out = tmp_path / "out.mp4"
    out.write_bytes(b"precious")
    clip, speech = make_clip(60), make_speech(2.4)
    fast = stages()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(MediaError, match=r"out\.mp4: .*(failed|written): File too large"):
            fast(clip, speech, out, num_frames=4, num_inference_steps=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert out.read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "clip.mp4",
        "out.mp4",
        "speech.wav",
    ]
    assert threads() == []


@pytest.mark.usefixtures("stages")
def test_an_interrupted_list_goes_on_where_it_was(
    tiny_pipeline: LatentSyncPipeline,
    make_clip: Maker,
    make_speech: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C in the second of three clips, while its film is being written."""
    monkeypatch.setattr(
        LatentSyncPipeline, "from_pretrained", classmethod(lambda *_, **__: tiny_pipeline)
    )
    make_clip(8)
    make_speech(0.32)
    listed = tmp_path / "list.csv"
    lines = [f"clip.mp4,speech.wav,{number}.mp4" for number in (1, 2, 3)]
    listed.write_text("\n".join(["video,audio,output", *lines]) + "\n")
    words = ["lsync", "sync", "--jobs", str(listed), "--steps", "1", "--num-frames", "4", "--json"]
    monkeypatch.setattr(sys, "argv", words)
    written, write = [], VideoWriter.write

    def interrupt(self: VideoWriter, frame: np.ndarray) -> None:
        written.append(1)
        if len(written) == 8 + 5:
            raise KeyboardInterrupt
        write(self, frame)

    with monkeypatch.context() as while_interrupted:
        while_interrupted.setattr(VideoWriter, "write", interrupt)
        with pytest.raises(SystemExit) as leaving:
            cli.main()
    assert leaving.value.code == 130
    assert "interrupted" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["1.mp4", "clip.mp4"]
    assert list(tmp_path.glob(".*")) == []
    assert threads() == []
    first = (tmp_path / "1.mp4").stat().st_mtime_ns
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert leaving.value.code == 0
    summary = json.loads(capsys.readouterr().out)
    assert [job["state"] for job in summary["jobs"]] == ["skipped", "done", "done"]
    assert (tmp_path / "1.mp4").stat().st_mtime_ns == first


@pytest.fixture
def other_pipeline(tiny_pipeline: LatentSyncPipeline) -> LatentSyncPipeline:
    """A second pipeline with weights of its own."""
    import copy

    other = LatentSyncPipeline(
        copy.deepcopy(tiny_pipeline.vae),
        copy.deepcopy(tiny_pipeline.audio_encoder),
        copy.deepcopy(tiny_pipeline.unet),
        copy.deepcopy(tiny_pipeline.scheduler),
        detector=type(tiny_pipeline.detector)(),
    )
    for parameter in other.unet.parameters():
        parameter.data.mul_(0.9)
    other.set_progress_bar_config(disable=True)
    return other


def test_two_pipelines_in_two_threads_give_what_each_gives_alone(
    tiny_pipeline: LatentSyncPipeline,
    other_pipeline: LatentSyncPipeline,
    stages: Callable[..., Any],
    make_clip: Maker,
    make_speech: Maker,
) -> None:
    clips = make_clip(9), make_clip(12, name="b.mp4", black=(5,))
    speech = make_speech(0.5)
    alone = [
        pictures(pipeline, clip, speech)
        for pipeline, clip in zip((tiny_pipeline, other_pipeline), clips, strict=True)
    ]
    fast = stages(temporal_start="path"), stages(other_pipeline)
    alone[0] = pictures(fast[0], clips[0], speech)
    together: dict[int, np.ndarray] = {}
    both = threading.Barrier(2)

    def work(which: int) -> None:
        both.wait()
        together[which] = pictures(fast[which], clips[which], speech)

    workers = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for which in (0, 1):
        np.testing.assert_array_equal(together[which], alone[which])
    reports = [each.lsync.report() for each in fast]
    assert [report.counters["runs"] for report in reports] == [2, 1]
    assert "temporal_start" not in reports[1].features
    assert np.abs(together[0][:9].astype(int) - together[1][:9]).max() > 0

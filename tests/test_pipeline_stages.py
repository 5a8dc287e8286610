"""Compiled runs with stages side by side, cached faces and clips: the same frames."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lsync_compile
from lsync_compile.errors import NoFaceError
from lsync_compile.models.pipeline import LatentSyncPipeline

Maker = Callable[..., Path]


@pytest.fixture
def compiled(
    tiny_pipeline: LatentSyncPipeline, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """A function that compiles the pipeline with options; graphs run as they are."""
    # What is compiled has its own tests; the stages are what matters here.
    monkeypatch.setattr("lsync_compile.compiled.PipelineHandle.settle", lambda handle: None)

    def make(**options: Any) -> Any:
        return lsync_compile.compile(tiny_pipeline, preset="exact", lowering="eager", **options)

    return make


def frames(pipeline: Any, clip: Path, speech: Path, **arguments: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(7)
    results = pipeline.synthesize(
        clip, speech, num_frames=4, num_inference_steps=2, generator=generator, **arguments
    )
    return np.stack([frame for result in results for frame in result.frames])


def test_overlapped_runs_give_the_bytes_of_serial_ones(
    tiny_pipeline: LatentSyncPipeline,
    compiled: Callable[..., Any],
    make_clip: Maker,
    make_speech: Maker,
    tmp_path: Path,
) -> None:
    """On a loop, with a frame without a face, a short last chunk and draws in each step."""
    clip, speech = make_clip(9, black=(5,)), make_speech(0.76)
    plain = frames(tiny_pipeline, clip, speech, eta=0.5)
    trace = tmp_path / "trace.json"
    fast = compiled(parallel_stages="on", trace=trace)
    np.testing.assert_array_equal(frames(fast, clip, speech, eta=0.5), plain)
    report = fast.lsync.report()
    assert list(report.times) == ["read", "faces", "encode", "denoise", "decode", "paste"]
    assert all(spent.calls == 5 for spent in report.times.values())
    assert "time: denoise" in str(report)
    assert report.features["encodings"]["frames"] == 19
    assert report.features["encodings"]["reused"] > 0
    assert sum(event["ph"] == "X" for event in json.loads(trace.read_text())["traceEvents"]) == 30
    # A second run starts from nothing.
    np.testing.assert_array_equal(frames(fast, clip, speech, eta=0.5), plain)


def test_a_file_is_written_from_overlapped_stages(
    compiled: Callable[..., Any], make_clip: Maker, make_speech: Maker, tmp_path: Path
) -> None:
    fast = compiled(parallel_stages="on")
    result = fast(make_clip(6), make_speech(0.3), tmp_path / "out.mp4", num_inference_steps=1)
    assert result.num_frames == 8
    assert fast.lsync.report().times["write"].calls == 1


def test_an_error_in_a_stage_reaches_the_caller_and_leaves_no_file(
    compiled: Callable[..., Any], make_clip: Maker, make_speech: Maker, tmp_path: Path
) -> None:
    fast = compiled(parallel_stages="on")
    with pytest.raises(NoFaceError, match="frame 5"):
        fast(
            make_clip(9, black=(5,)),
            make_speech(0.36),
            tmp_path / "out.mp4",
            num_frames=4,
            num_inference_steps=1,
            on_missing_face="fail",
        )
    assert [path.name for path in tmp_path.glob("*out*")] == []


def test_the_same_clip_with_another_sound_needs_neither_faces_nor_encodings(
    tiny_pipeline: LatentSyncPipeline,
    compiled: Callable[..., Any],
    make_clip: Maker,
    make_speech: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LSYNC_CACHE", str(tmp_path / "cache"))
    clip = make_clip(8, black=(2,))
    speech, other = make_speech(0.32), make_speech(0.28, name="other.wav")
    plain = frames(tiny_pipeline, clip, other)
    frames(compiled(clip_cache=True), clip, speech)
    calls = tiny_pipeline.detector.calls  # type: ignore[attr-defined]
    fast = compiled(clip_cache=True)
    np.testing.assert_array_equal(frames(fast, clip, other), plain)
    assert tiny_pipeline.detector.calls == calls  # type: ignore[attr-defined]
    found = fast.lsync.report().features
    # Of the first chunk, whose third frame borrows a face; the short last one was encoded in a
    # batch of another size.
    assert found["encodings"]["stored"] == 3
    assert found["clip cache"]["faces"] == 8

    # The same name, another film.
    changed = make_clip(8)
    assert changed == clip
    np.testing.assert_array_equal(
        frames(compiled(clip_cache=True), changed, other), frames(tiny_pipeline, changed, other)
    )


def test_batched_faces_are_within_rounding(
    tiny_pipeline: LatentSyncPipeline,
    compiled: Callable[..., Any],
    make_clip: Maker,
    make_speech: Maker,
) -> None:
    clip, speech = make_clip(6, black=(3,)), make_speech(0.24)
    plain = frames(tiny_pipeline, clip, speech).astype(int)
    batched = frames(compiled(batch_faces="on"), clip, speech)
    # A face's own rounding goes through the networks before it is pasted.
    assert np.abs(batched - plain).max() <= 3
    np.testing.assert_array_equal(batched[3], plain[3])

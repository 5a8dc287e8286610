"""LatentSync's own pipeline, plain and compiled, from clip to file."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from lsync_compile import LatentSyncPipeline
from lsync_compile.models import pipeline as module
from lsync_compile.runtime import staged

Maker = Callable[..., Path]
# Half batches round otherwise; all else is the bits of the plain pipeline.
EXACT = {
    "preset": "exact",
    "lowering": "eager",
    "strict": True,
    "guidance_prefix": False,
    "null_audio": False,
}
written: list[np.ndarray] = []


class Recorder:
    """Takes the frames before the encoder does: x264 does not give the same bits every time."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        written.clear()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def write(self, frame: np.ndarray) -> None:
        written.append(frame.copy())


def test_frames_are_the_same_bits_and_a_second_clip_compiles_nothing(
    tiny_pipeline: LatentSyncPipeline,
    make_clip: Maker,
    make_speech: Maker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "VideoWriter", Recorder)
    torch._dynamo.reset()
    clip, speech = make_clip(8), make_speech(0.28)  # 7 frames: a chunk of 4 and a short one of 3
    seen: list[int] = []
    done: list[tuple[int, int]] = []

    def run(pipe: LatentSyncPipeline, *, steps: int = 2, source: Path = clip) -> list:
        seen.clear()
        pipe(
            source,
            speech,
            clip.with_name("out.mp4"),
            num_frames=4,
            num_inference_steps=steps,
            guidance_scale=1.5,
            generator=torch.Generator().manual_seed(0),
            callback=lambda step, timestep, latents: seen.append(step),
            progress=lambda so_far, total: done.append((so_far, total)),
        )
        return list(written)

    expected = run(tiny_pipeline)
    assert len(expected) == 7
    fast = torch.compile(tiny_pipeline, backend="lsync", options=EXACT)
    assert isinstance(fast, LatentSyncPipeline)
    assert all(map(np.array_equal, run(fast), expected))
    assert seen == [0, 1, 0, 1]
    assert done[-1] == (4, 4)

    report = fast.lsync.report()
    unet = [graph for graph in report.graphs if graph.target == "unet"]
    assert [graph.kind for graph in unet] == ["first", "variant"]
    assert [graph.calls for graph in unet] == [2, 2]
    assert report.counters["breaks"] == report.counters["recompiles"] == 0

    graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        fast.to(torch.float64).to(torch.float32)  # other tensors with the same values
        assert all(map(np.array_equal, run(fast), expected))
        run(fast, steps=3, source=make_clip(5, name="other.mp4"))
        paced = {**EXACT, "temporal_start": "path", "temporal_strength": 0.5}
        assert torch.compile(tiny_pipeline, backend="lsync", options=paced) is fast
        run(fast, steps=4)
    assert counters["stats"]["unique_graphs"] == graphs
    assert fast.lsync.report().features["temporal_start"]["steps_saved"] == 2

    plain = fast.lsync.undo()
    assert plain is tiny_pipeline
    assert all(map(np.array_equal, run(plain), expected))


def test_stages_run_once_a_chunk_and_are_dropped_with_the_pipeline(
    tiny_pipeline: LatentSyncPipeline,
    make_clip: Maker,
    make_speech: Maker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "VideoWriter", Recorder)
    torch._dynamo.reset()
    made: list[weakref.ref] = []
    plain_run = staged._run

    def noted(*args: object) -> tuple:
        results = plain_run(*args)
        made.extend(map(weakref.ref, results))
        return results

    monkeypatch.setattr(staged, "_run", noted)
    clip = make_clip(8)

    def run(pipe: LatentSyncPipeline, speech: Path, steps: int) -> list:
        generator = torch.Generator().manual_seed(0)
        more = {"num_frames": 4, "num_inference_steps": steps, "generator": generator}
        pipe(clip, speech, clip.with_name("out.mp4"), **more)
        return list(written)

    one, other = make_speech(0.32), make_speech(0.32, name="other.wav")
    expected = run(tiny_pipeline, other, 3)
    fast = torch.compile(tiny_pipeline, backend="lsync", options=EXACT)
    run(fast, one, 2)
    assert all(map(np.array_equal, run(fast, other, 3), expected))  # B after A is B alone
    report = fast.lsync.report()
    (unet,) = (graph for graph in report.graphs if graph.target == "unet")
    used = {stage.name: (stage.computed, stage.reused) for stage in unet.stages}
    # Two runs of two chunks, of 2 and 3 steps.
    assert used == {"timestep": (2 + 3, 2 + 3), "chunk": (4, 6)}
    assert "stage chunk: " in str(report)

    assert any(result() is not None for result in made)
    fast.lsync.undo()
    gc.collect()
    assert all(result() is None for result in made)

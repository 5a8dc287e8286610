"""Chunks that share calls of the UNet: which do, what comes out, what happens without memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from captures import capture, make_unet, unet_inputs
from fixtures import RecordedChunk, mini, recorded_chunks
from torch import Tensor

import lsync_compile
from lsync_compile.errors import MemoryLimitError
from lsync_compile.graph.liveness import lifetimes
from lsync_compile.models.conditions import Conditions, Prepared
from lsync_compile.models.job import Job
from lsync_compile.models.pipeline import LatentSyncPipeline
from lsync_compile.models.synthesis import ChunkSynthesizer
from lsync_compile.options import resolve_options
from lsync_compile.report import Session
from lsync_compile.runtime import batching
from lsync_compile.runtime.batching import Lane, SmartBatcher, chunk_bytes
from lsync_compile.runtime.memory import plan

__all__ = ["mini", "recorded_chunks"]

FRAMES, STEPS = 2, 4
CPU = torch.device("cpu")
# Convolutions and matrix products of another batch size round otherwise; all else is the same.
ROUNDING = {"atol": 2e-4, "rtol": 1e-4}
Maker = Callable[..., Path]


def lane(chunk: int, frames: int = 16, steps: int = 4, guided: int | None = None) -> Any:
    """As much of a lane as is looked at to find calls."""
    latents, timesteps = torch.empty(1, 4, frames, 1, 1), torch.arange(steps)
    walk = SimpleNamespace(chunk=chunk, latents=latents, timesteps=timesteps, guided=guided)
    return Lane(walk, None, None, None)  # type: ignore[arg-type]


def batcher(**options: Any) -> SmartBatcher:
    return SmartBatcher(Session("run", resolve_options("exact", options)), 1, CPU)


def numbers(calls: list[list[Lane]]) -> list[list[int]]:
    return [[each.walk.chunk for each in call] for call in calls]


def test_what_has_the_same_frames_and_steps_shares_calls() -> None:
    lanes = [lane(0), lane(1, steps=3), lane(2), lane(3, steps=3), lane(4, frames=9)]
    assert numbers(batcher(batch_chunks=4).calls(lanes)) == [[0, 2], [1, 3], [4]]
    assert numbers(SmartBatcher(None, 1, CPU).calls(lanes)) == [[0], [2], [1], [3], [4]]
    assert numbers(batcher(batch_chunks=4).calls([lane(0), lane(1, guided=1)])) == [[0], [1]]


def test_calls_have_few_sizes() -> None:
    lanes = [lane(number) for number in range(7)]
    assert numbers(batcher(batch_chunks=4).calls(lanes)) == [[0, 1, 2, 3], [4, 5], [6]]
    assert numbers(batcher(batch_chunks=3).calls(lanes)) == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_budget_halves_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    session = Session("run", resolve_options("exact", batch_chunks=8, batch_memory_gib=5.0))
    assert SmartBatcher(session, gib, CPU).limit == 4
    assert "cut to 4: a chunk takes 1.0 GiB, the budget is 5.0 GiB" in str(session.report())
    monkeypatch.setattr(batching, "free_bytes", lambda device: 5 * gib)
    assert batcher(batch_chunks=8).limit == 8
    session = Session("run", resolve_options("exact", batch_chunks=8))
    assert SmartBatcher(session, gib, CPU).limit == 2  # half of what is free


def test_the_estimate_covers_what_the_plan_of_the_graph_says() -> None:
    inputs = unet_inputs()
    batch, _, frames, height, width = inputs["sample"].shape
    with torch.no_grad():
        gm, _ = capture(make_unet(layers=1, levels=2), **inputs)
    planned = plan(lifetimes(gm.graph)).bound
    estimated = chunk_bytes(32, batch * frames * height * width, 4)
    assert planned < estimated < 1.2 * planned


class Run:
    """A run of chunks on the tiny pipeline, together or one by one."""

    def __init__(self, pipeline: LatentSyncPipeline, **more: Any) -> None:
        names = ("guidance_scale", "eta", "callback")
        arguments = {name: more.pop(name) for name in names if name in more}
        self.session = Session("run", resolve_options("exact", more))
        job = Job(
            **{
                "video_path": Path("none.mp4"),
                "sound": torch.zeros(1).numpy(),
                "count": FRAMES,
                "fps": 25,
                "num_frames": FRAMES,
                "num_inference_steps": STEPS,
                "guidance_scale": 1.5,
                "eta": 0.0,
                "mask": pipeline.mask,
                "generator": torch.Generator().manual_seed(3),
                "callback": None,
                "callback_steps": 1,
                "progress": None,
                "tracker": None,
                "session": self.session,
                **arguments,
            }
        )
        self.synthesizer = ChunkSynthesizer(
            pipeline.vae, pipeline.unet, pipeline.scheduler, job, CPU
        )
        self.batches: list[int] = []
        self.progress: list[int] = []

    def __call__(self, chunks: list[tuple[Tensor, Tensor]], size: int = 1) -> list[Tensor]:
        """Clean latents of each chunk, ``size`` of them handed over at a time."""
        synthesizer, found = self.synthesizer, []
        hook = synthesizer.unet.register_forward_pre_hook(
            lambda _, args: self.batches.append(len(args[0]))
        )
        prepared = [
            (number, synthesizer.prepare(faces), audio)
            for number, (faces, audio) in enumerate(chunks)
        ]
        try:
            for first in range(0, len(chunks), size):
                group = prepared[first : first + size]
                found += synthesizer.denoise_together(group, self.progress.append)
        finally:
            hook.remove()
        return found

    @property
    def counted(self) -> dict[str, float]:
        return self.session.report().features["batching"]


@pytest.fixture
def chunks() -> list[tuple[Tensor, Tensor]]:
    """Faces and sound of four chunks of one shot, the last of one frame less."""
    generator = torch.Generator().manual_seed(0)
    face = torch.randint(0, 250, (1, 3, 64, 64), generator=generator)
    return [
        (
            (face + number).expand(frames, -1, -1, -1).to(torch.uint8),
            torch.randn(frames, 50, 384, generator=generator),
        )
        for number, frames in enumerate((FRAMES, FRAMES, FRAMES, FRAMES - 1))
    ]


@pytest.mark.parametrize("guidance", [1.5, 1.0])
def test_chunks_together_are_what_they_are_alone(
    tiny_pipeline: LatentSyncPipeline, chunks: list[tuple[Tensor, Tensor]], guidance: float
) -> None:
    alone = Run(tiny_pipeline, guidance_scale=guidance)
    together = Run(tiny_pipeline, guidance_scale=guidance, batch_chunks=2)
    for one, other in zip(alone(chunks), together(chunks, 4), strict=True):
        torch.testing.assert_close(other, one, **ROUNDING)
    single = 2 if guidance > 1 else 1
    assert together.batches == [2 * single] * STEPS + [single] * 2 * STEPS
    assert together.progress == [2, 4, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    counted = together.counted
    assert {name: counted[name] for name in ("chunks", "batched", "calls_saved", "alone")} == {
        "chunks": 4,
        "batched": 2,
        "calls_saved": STEPS,
        "alone": 2,
    }


def test_solvers_do_not_see_each_others_steps(
    tiny_pipeline: LatentSyncPipeline, chunks: list[tuple[Tensor, Tensor]]
) -> None:
    alone = Run(tiny_pipeline, solver="dpmpp_2m")
    together = Run(tiny_pipeline, solver="dpmpp_2m", batch_chunks=3)
    for one, other in zip(alone(chunks), together(chunks, 4), strict=True):
        torch.testing.assert_close(other, one, **ROUNDING)
    assert together.batches[0] == 6


def test_a_chunk_that_others_learn_from_goes_ahead(
    tiny_pipeline: LatentSyncPipeline, chunks: list[tuple[Tensor, Tensor]]
) -> None:
    path = {"temporal_start": "path", "temporal_strength": 0.5}
    alone, together = Run(tiny_pipeline, **path), Run(tiny_pipeline, **path, batch_chunks=2)
    for one, other in zip(alone(chunks), together(chunks, 4), strict=True):
        torch.testing.assert_close(other, one, **ROUNDING)
    assert together.batches == [2] * STEPS + [4] * (STEPS // 2) + [2] * (STEPS // 2)
    assert together.session.report().features["temporal_start"]["known"] == 3


def test_chunks_in_other_numbers_of_steps_do_not_wait_for_each_other(
    tiny_pipeline: LatentSyncPipeline, chunks: list[tuple[Tensor, Tensor]]
) -> None:
    adaptive = {"adaptive_steps": True, "adaptive_min_steps": 2, "adaptive_max_steps": STEPS}
    alone, together = Run(tiny_pipeline, **adaptive), Run(tiny_pipeline, **adaptive, batch_chunks=2)
    for one, other in zip(alone(chunks), together(chunks, 4), strict=True):
        torch.testing.assert_close(other, one, **ROUNDING)
    assert together.batches == [2] * STEPS + [4] * 2 + [2] * 2


def test_too_little_memory_halves_the_batch(
    tiny_pipeline: LatentSyncPipeline,
    chunks: list[tuple[Tensor, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also in the middle of a chunk; nothing is drawn twice."""
    chunks = [chunks[0], chunks[1], chunks[2], chunks[0]]
    expected = Run(tiny_pipeline, solver="unipc")(chunks)
    forward, calls = tiny_pipeline.unet.forward, []

    def too_large(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(sample))
        if len(sample) > 4 and len(calls) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(tiny_pipeline.unet, "forward", too_large)
    run = Run(tiny_pipeline, solver="unipc", batch_chunks=4)
    for one, other in zip(expected, run(chunks, 4), strict=True):
        torch.testing.assert_close(other, one, **ROUNDING)
    assert calls == [8] * 3 + [4] * 2 * STEPS
    assert run.counted["out_of_memory"] == 1
    assert "4 chunks a call do not fit on cpu; a run went on with 2" in str(run.session.report())
    assert run.progress == sorted(run.progress)


def test_a_chunk_that_does_not_fit_alone_is_an_error(
    tiny_pipeline: LatentSyncPipeline,
    make_clip: Maker,
    make_speech: Maker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lsync_compile.compiled.PipelineHandle.settle", lambda handle: None)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(tiny_pipeline.unet, "forward", never)
    fast = lsync_compile.compile(tiny_pipeline, preset="exact", batch_chunks=2)
    with pytest.raises(MemoryLimitError, match="num_frames=4; use a smaller"):
        list(fast.synthesize(make_clip(8), make_speech(0.32), num_frames=4))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"eta": 0.5}, "DDIMScheduler with eta=0.5 may draw noise"),
        ({"callback": lambda *_: None}, "a callback wants each chunk's steps in their order"),
    ],
)
def test_what_stands_in_the_way_is_said(
    tiny_pipeline: LatentSyncPipeline,
    chunks: list[tuple[Tensor, Tensor]],
    arguments: dict[str, Any],
    why: str,
) -> None:
    alone = Run(tiny_pipeline, **arguments)
    run = Run(tiny_pipeline, **arguments, batch_chunks=2)
    assert all(map(torch.equal, run(chunks[:2], 2), alone(chunks[:2])))
    run.synthesizer.batcher.account()
    assert f"batch_chunks did nothing in a run: {why}" in str(run.session.report())


def test_an_error_in_a_batch_leaves_nothing_assumed(
    tiny_pipeline: LatentSyncPipeline,
    chunks: list[tuple[Tensor, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(tiny_pipeline, temporal_start="path", temporal_strength=0.5, batch_chunks=2)
    run(chunks[:1])
    monkeypatch.setattr(tiny_pipeline.unet, "forward", lambda *_, **__: 1 / 0)
    inputs = [(n, run.synthesizer.prepare(faces), sound) for n, (faces, sound) in enumerate(chunks)]
    with pytest.raises(ZeroDivisionError):
        run.synthesizer.denoise_together(inputs[1:3], lambda _: None)
    assert not run.synthesizer.pace._temporal.knows(3)  # type: ignore[union-attr]


def frames(pipeline: Any, clip: Path, speech: Path) -> np.ndarray:
    results = pipeline.synthesize(
        clip,
        speech,
        num_frames=4,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(7),
    )
    pictures = []
    for number, result in enumerate(results):
        assert result.index == number
        pictures += result.frames
    return np.stack(pictures)


@pytest.mark.parametrize("stages", ["on", "off"])
def test_a_run_in_groups_is_a_run(
    tiny_pipeline: LatentSyncPipeline,
    make_clip: Maker,
    make_speech: Maker,
    monkeypatch: pytest.MonkeyPatch,
    stages: str,
) -> None:
    """With a chunk without a face, and a short last one."""
    monkeypatch.setattr("lsync_compile.compiled.PipelineHandle.settle", lambda handle: None)
    clip, speech = make_clip(22, black=(8, 9, 10, 11)), make_speech(0.88)
    plain = frames(tiny_pipeline, clip, speech).astype(int)
    fast = lsync_compile.compile(
        tiny_pipeline, preset="exact", batch_chunks=4, parallel_stages=stages
    )
    assert np.abs(frames(fast, clip, speech) - plain).max() <= 1
    counted = fast.lsync.report().features["batching"]
    assert (counted["chunks"], counted["batched"], counted["alone"]) == (5, 2, 3)
    assert fast.lsync.report().times["denoise"].calls == 2


def test_the_chunk_that_others_learn_from_is_a_group_of_its_own(
    tiny_pipeline: LatentSyncPipeline,
    make_clip: Maker,
    make_speech: Maker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lsync_compile.compiled.PipelineHandle.settle", lambda handle: None)
    fast = lsync_compile.compile(
        tiny_pipeline,
        preset="exact",
        batch_chunks=2,
        temporal_start="path",
        temporal_strength=0.5,
        scene_cut=1.0,
    )
    frames(fast, make_clip(12), make_speech(0.48))
    report = fast.lsync.report()
    assert report.features["batching"]["batched"] == 2
    assert report.times["denoise"].calls == 2  # the first, then two


def test_compiled_with_caches_and_the_mouths_attention(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker, make_speech: Maker
) -> None:
    """Halves of guidance, features kept from step to step and pooled keys, of two chunks a call."""
    torch._dynamo.reset()
    tiny_pipeline.register_modules(unet=make_unet(layers=1, levels=2))
    clip, speech = make_clip(8), make_speech(0.32)
    options = {
        "lowering": "eager",
        "strict": True,
        "kernels": "on",
        "deep_cache": True,
        "deep_cache_interval": 2,
        "lip_attention": True,
        "lip_pool": "2",
        "split_conv_in": True,
        "compile_vae": False,
    }
    alone = lsync_compile.compile(tiny_pipeline, preset="exact", **options)
    expected = frames(alone, clip, speech).astype(int)
    alone.lsync.undo()
    together = lsync_compile.compile(tiny_pipeline, preset="exact", batch_chunks=2, **options)
    found = frames(together, clip, speech)
    assert np.abs(found - expected).max() <= 1
    (unet,) = [graph for graph in together.lsync.report().graphs if graph.target == "unet"]
    assert unet.calls == 2
    assert unet.deep_cache is not None
    assert (unet.deep_cache.computed, unet.deep_cache.reused) == (1, 1)
    applied = {done.name for done in unet.passes if done.outcome == "applied"}
    assert {"guidance_prefix", "null_audio", "lip_attention", "split_conv_in"} <= applied


def test_the_trained_model_to_rounding(
    recorded_chunks: list[RecordedChunk], mini: LatentSyncPipeline
) -> None:
    """In float32, a quarter of the steps: two chunks of one run, each as it is alone."""
    full, tail = recorded_chunks[0], recorded_chunks[-1]
    count = len(tail)

    def denoise(size: int) -> list[Tensor]:
        run = Run(mini, batch_chunks=2)
        lanes = []
        for number, chunk in enumerate((full, tail)):
            fixed, audio = chunk.fixed[:, :, :count], chunk.audio[:count]
            conditions = Conditions(
                torch.cat([torch.zeros_like(audio), audio]), torch.cat([fixed, fixed])
            )
            faces, scheduler = Prepared(torch.zeros(count, 3, 8, 8), []), run.synthesizer.scheduler
            walk = run.synthesizer.pace.begin(
                number, faces, fixed[:, -4:], tail.noise, scheduler, {}
            )
            lanes.append(Lane(walk, conditions, scheduler, faces))
        with torch.no_grad():
            return [
                latents
                for first in range(0, 2, size)
                for latents in run.synthesizer._denoise(lanes[first : first + size], None)
            ]

    for together, alone in zip(denoise(2), denoise(1), strict=True):
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)

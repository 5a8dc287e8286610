"""Deep features reused by a compiled pipeline: from options to frames, and what must not leak."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from captures import Attention, make_unet, unet_inputs
from fixtures import RecordedChunk, denoise, mini, mouth_psnr, recorded_chunks
from torch import Tensor
from torch._dynamo.utils import counters

import lsync_compile
from lsync_compile import LatentSyncPipeline
from lsync_compile.options import Options
from lsync_compile.report import DeepCacheRecord, Report, Session
from lsync_compile.runtime.context import step_context
from lsync_compile.targets import CompiledCall

__all__ = ["mini", "recorded_chunks"]

Maker = Callable[..., Path]
EXACT = {
    "preset": "exact",
    "lowering": "eager",
    "strict": True,
    "guidance_prefix": False,
    "null_audio": False,
}


def faces(pipe: Any, clip: Path, speech: Path, *, steps: int = 4, **more: Any) -> list[Tensor]:
    """The generated faces of each chunk."""
    chunks = pipe.synthesize(
        clip,
        speech,
        num_frames=4,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        progress=lambda done, total: None,
        **more,
    )
    return [chunk.synced for chunk in chunks]


def caches(report: Report) -> list[DeepCacheRecord]:
    return [graph.deep_cache for graph in report.graphs if graph.deep_cache is not None]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_a_pipeline_from_all_steps_computed_to_few(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker, make_speech: Maker
) -> None:
    torch._dynamo.reset()
    clip, one, other = make_clip(8), make_speech(0.32), make_speech(0.32, name="other.wav")
    plain = faces(tiny_pipeline, clip, other)

    def fast(**options: Any) -> Any:
        return lsync_compile.compile(
            tiny_pipeline, **EXACT, deep_cache=True, compile_vae=False, **options
        )

    # All steps computed: the plain pipeline's bits.
    assert same(faces(fast(deep_cache_interval=1), clip, other), plain)
    (cache,) = caches(fast(deep_cache_interval=1).lsync.report())
    assert (cache.computed, cache.reused, cache.reason) == (8, 0, "")
    assert cache.shallow_operations < 0.3 * cache.operations  # one layer a level: a large share
    assert "never reused" in str(fast(deep_cache_interval=1).lsync.report())

    # Another schedule compiles nothing.
    graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        alone = faces(fast(deep_cache_interval=2, deep_cache_predictor="linear"), clip, other)
        assert counters["stats"]["unique_graphs"] == graphs
        assert not same(alone, plain)
        report = fast(deep_cache_interval=2, deep_cache_predictor="linear").lsync.report()
        (cache,) = caches(report)
        assert (cache.computed, cache.reused) == (8 + 4, 4)
        assert "computed 12, reused 4" in str(report)
        assert "never reused" not in str(report)

        # B after A is B alone, whatever steps A had and however it ended.
        pipe = fast(deep_cache_interval=2, deep_cache_predictor="linear")
        faces(pipe, clip, one, steps=3)
        assert same(faces(pipe, clip, other), alone)
        with pytest.raises(ZeroDivisionError):
            faces(pipe, clip, one, callback=lambda *_: 1 / 0)
        assert same(faces(pipe, clip, other), alone)

    # Back to the plain pipeline.
    assert same(faces(pipe.lsync.undo(), clip, other), plain)


def test_a_bare_module_is_never_approximated() -> None:
    unet, inputs = make_unet(layers=1), unet_inputs(frames=2)
    expected = unet(**inputs).sample
    compiled = lsync_compile.compile(unet, lowering="eager", strict=True, deep_cache=True)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(compiled(**inputs).sample, expected)
    assert not caches(compiled.lsync.report())


def test_a_unet_without_skip_joins_says_why_it_stays_whole() -> None:
    module = Attention().eval()
    session = Session("x", Options(lowering="eager", deep_cache=True, strict=True))
    call = CompiledCall(module, session, "unet", owner=session, dynamic=False, fullgraph=False)
    sample, timestep = torch.rand(1, 4, 8, 8), torch.tensor(5)
    with torch.no_grad(), step_context("run", 0, 0, 2, "reuse"):
        assert torch.equal(call(sample, timestep), module(sample, timestep))
    (cache,) = caches(session.report())
    assert cache.reason == "it has no skip joins"
    assert "deep cache: none (it has no skip joins)" in str(session.report())


def test_the_line_through_two_steps_keeps_the_bound_on_a_trained_model(
    recorded_chunks: list[RecordedChunk], mini: LatentSyncPipeline
) -> None:
    chunk = recorded_chunks[-1]
    fast = lsync_compile.compile(
        mini,
        lowering="eager",
        strict=True,
        compile_vae=False,
        deep_cache=True,
        deep_cache_predictor="linear",
        deep_cache_head=2,
        deep_cache_interval=5,
    )
    try:
        latents = denoise(fast, chunk)
        (cache,) = caches(fast.lsync.report())
    finally:
        fast.lsync.undo()
    assert (cache.computed, cache.reused) == (5, 15)
    assert mouth_psnr(mini, chunk, latents) > 45  # 51.7 dB; a chunk of 9 steps has 38.9

"""The recorded chunks, and the script that records them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures import RecordedChunk, denoise, load_chunks, mini, mouth_psnr, recorded_chunks
from fixtures.make_chunks import FULL, TAIL, listen, record, write

from lsync_compile.models.pipeline import LatentSyncPipeline

__all__ = ["mini", "recorded_chunks"]


def test_recording_gives_what_the_pipeline_makes(
    tiny_pipeline: LatentSyncPipeline,
    make_clip: Callable[..., Path],
    make_speech: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """On a tiny random model; the plain loop agrees with the pipeline, or `record` would fail."""
    seconds = (FULL + TAIL) / 25
    heard = listen(tiny_pipeline, make_clip(FULL + TAIL), make_speech(seconds))
    assert [(chunk.name, len(chunk)) for chunk in heard] == [("full", FULL), ("tail", TAIL)]
    tail = record(tiny_pipeline, heard[1])
    path = tmp_path / "chunks.safetensors"
    write(path, [tail])
    (back,) = load_chunks(path)
    for part in ("noise", "fixed", "audio", "latents"):
        torch.testing.assert_close(getattr(back, part), getattr(tail, part), atol=0, rtol=0)
    torch.testing.assert_close(denoise(tiny_pipeline, back), back.latents, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_recorded_chunks_are_those_of_the_bundled_model(
    recorded_chunks: list[RecordedChunk], mini: LatentSyncPipeline
) -> None:
    """Fails when the model was exchanged and the chunks were not recorded anew."""
    tail = recorded_chunks[-1]
    assert mouth_psnr(mini, tail, denoise(mini, tail)) > 60


@pytest.mark.slow
def test_fewer_steps_cost_something(
    recorded_chunks: list[RecordedChunk], mini: LatentSyncPipeline
) -> None:
    """The bound of an option means little unless doing less is visibly worse."""
    tail = recorded_chunks[-1]
    ten, four = (mouth_psnr(mini, tail, denoise(mini, tail, steps=steps)) for steps in (10, 4))
    assert 20 < four < ten < 60

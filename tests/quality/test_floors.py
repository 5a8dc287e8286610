"""Noise floors, on the tiny random pipeline and a real encode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lsync_compile.models.pipeline import LatentSyncPipeline
from lsync_compile.quality.floors import codec_floor, precision_floor
from lsync_compile.quality.runs import Run, Setting, collect

Maker = Callable[..., Path]
SETTING = Setting("reference", steps=2, num_frames=4)


@pytest.fixture
def clip(make_clip: Maker) -> Path:
    return make_clip(6, black=(4,))


@pytest.fixture
def run(tiny_pipeline: LatentSyncPipeline, clip: Path) -> Run:
    return collect(tiny_pipeline, clip, None, SETTING)


def test_half_precision_differs_by_rounding(
    tiny_pipeline: LatentSyncPipeline, clip: Path, run: Run
) -> None:
    unet = tiny_pipeline.unet
    floor = precision_floor(tiny_pipeline, clip, None, run)
    assert floor.name == "floor: float16"
    assert 35 < floor.scores["mouth"].psnr.value < 100
    assert floor.scores["frame"].psnr.value > floor.scores["mouth"].psnr.value
    # The pipeline is as it was, and gives the same bytes.
    assert tiny_pipeline.unet is unet
    assert unet.dtype == torch.float32
    again = collect(tiny_pipeline, clip, None, SETTING)
    torch.testing.assert_close(again.synced.clip(0, 6), run.synced.clip(0, 6), atol=0, rtol=0)


def test_codec_floor_rises_with_quality(tiny_pipeline: LatentSyncPipeline, run: Run) -> None:
    fine, coarse = (codec_floor(run, tiny_pipeline.detector, crf=crf) for crf in (18, 40))
    assert fine.name == "floor: x264 crf 18"
    for region in ("mouth", "frame"):
        assert 10 < coarse.scores[region].psnr.value < fine.scores[region].psnr.value < 60
    # The black frame has no face: it counts in the frame and not in the mouth region.
    assert [value != value for value in fine.scores["mouth"].frames_psnr].index(True) == 4
    assert fine.scores["frame"].frames_psnr[4] > 40

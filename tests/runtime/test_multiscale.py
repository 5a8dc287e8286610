"""MultiScaleProcessor: the region of a mask, detail outside it, and what a run is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lsync_compile
from lsync_compile.errors import OptionError
from lsync_compile.kernels.lip_tables import decode_region
from lsync_compile.media.mask import mouth_mask
from lsync_compile.models.pipeline import LatentSyncPipeline
from lsync_compile.options import Options
from lsync_compile.report import Session
from lsync_compile.runtime.context import Terms, current_terms, step_context
from lsync_compile.runtime.multiscale import MultiScaleProcessor, detail_score, pool_for
from lsync_compile.runtime.region import current_region, make_region, mouth_region, region_of

FLAT = torch.zeros(2, 3, 64, 64)
CHECKS = (torch.arange(64) // 8 + torch.arange(64)[:, None] // 8) % 2 * 2.0 - 1
CHECKS = CHECKS.expand(2, 3, 64, 64)


def session(**options: object) -> Session:
    return Session("test", Options(**{"preset": "exact", **options}))


def test_the_region_of_the_built_in_mask() -> None:
    region = make_region(mouth_mask(512), 64, pool=2)
    assert region is not None
    assert region.rows == (23, 61)
    inside = decode_region(region.cells)
    assert torch.equal(inside, region_of(mouth_mask(512), 64))
    assert 0.40 < inside.float().mean() < 0.46  # 40.7 % of the pixels, and cells on the edge
    assert make_region(torch.ones(1, 64, 64), 8) is None


def test_a_latent_with_one_generated_pixel_belongs_to_it() -> None:
    mask = torch.ones(1, 64, 64)
    mask[0, 17, 63] = 0.5
    assert region_of(mask, 8).nonzero().tolist() == [[2, 7]]
    with pytest.raises(OptionError, match="has no 9x9 latents"):
        region_of(mask, 9)


def test_detail() -> None:
    mask = mouth_mask(64)
    assert detail_score(FLAT, mask, 8) == 0
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    step = 8 / 63  # from one latent to the next; half of that at the borders
    assert 0.75 * step < detail_score(ramp, mask, 8) < step
    assert detail_score(ramp, torch.zeros(1, 64, 64), 8) == 0
    below = FLAT.clone()
    below[:, :, 32:56, 8:56] = CHECKS[:, :, 32:56, 8:56]  # in the mouth: does not count
    assert detail_score(below, mask, 64) < 0.3 * detail_score(CHECKS, mask, 64)
    assert [pool_for(score) for score in (0.05, 0.15, 0.5)] == [4, 2, 1]


def test_a_run_is_told_once() -> None:
    ours = session(lip_attention=True)
    scales = MultiScaleProcessor(mouth_mask(64), 8, ours)
    with scales.telling(FLAT):
        first = current_region()
        assert first is not None
        assert first.pool == 4
        with step_context("run", 0, 0, 1):
            assert current_terms() == Terms(chunks=True, region=first)
    assert current_region() is None
    with scales.telling(CHECKS):  # of a later chunk: graphs stay the same
        assert current_region() is first
    assert ours.report().features["multi_scale"] == {
        "detail": 0,
        "pooled_cell": 4,
        "rows": 5,
        "of_rows": 8,
    }


def test_nobody_is_told_who_does_not_ask() -> None:
    for each in (None, session(), session(deep_cache=True)):
        with MultiScaleProcessor(mouth_mask(64), 8, each).telling(FLAT):
            assert current_region() is None
    with MultiScaleProcessor(mouth_mask(64), 8, session(crop_decode=True)).telling(FLAT):
        assert current_terms().region == make_region(mouth_mask(64), 8)


def test_what_does_nothing_says_so() -> None:
    ours = session(lip_attention=True)
    sharp = (torch.arange(64) // 16 % 2 * 2.0 - 1).expand(1, 3, 64, 64)  # stripes
    with MultiScaleProcessor(mouth_mask(64), 8, ours).telling(sharp):
        pass
    (note,) = ours.report().notes[-1:]
    assert note.startswith("lip_attention does nothing: detail outside the mouth is 0.")
    with MultiScaleProcessor(torch.ones(1, 64, 64), 8, ours).telling(FLAT):
        assert current_region() is None
    assert ours.report().notes[-1].endswith("the mask keeps all")


def test_an_error_inside_leaves_nothing() -> None:
    region = make_region(mouth_mask(64), 8)
    with pytest.raises(KeyError), mouth_region(region):
        raise KeyError
    assert current_region() is None


def test_a_run_with_all_options(tiny_pipeline: LatentSyncPipeline, make_clip) -> None:
    """Graphs are rewritten, the kept part is the original's, a run leaves nothing to the next."""
    one, other = make_clip(4, name="one.mp4"), make_clip(4, name="other.mp4", size=(128, 160))

    def run(pipe: LatentSyncPipeline, clip: Path) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        (chunk,) = pipe.synthesize(
            clip, num_frames=4, max_frames=4, num_inference_steps=2, generator=generator
        )
        return chunk.synced

    plain = run(tiny_pipeline, other)
    fast = lsync_compile.compile(
        tiny_pipeline,
        lowering="eager",
        lip_attention=True,
        lip_pool="2",
        crop_decode=True,
        crop_encode=True,
        crop_halo=0,  # of 8 rows of latents
        guided_steps=1,
        temporal_start="off",
    )
    alone, _, after = run(fast, other), run(fast, one), run(fast, other)
    report = fast.lsync.report()
    fast.lsync.undo()
    applied = {
        (graph.target, record.name): record.matches
        for graph in report.graphs
        for record in graph.passes
        if record.outcome == "applied"
    }
    assert applied["unet", "lip_attention"] > 0
    assert applied["vae.decoder", "crop_decode"] > 0
    assert applied["vae.encoder", "crop_encode"] > 0
    # One graph for both halves of guidance, one for that with the sound.
    assert [graph.target for graph in report.graphs].count("unet") == 2
    assert report.counters["recompiles"] == 0
    assert torch.equal(alone, after)
    kept = tiny_pipeline.mask.expand(3, -1, -1) == 1
    assert torch.equal(alone[:, kept], plain[:, kept])
    assert not torch.equal(alone, plain)
    assert torch.equal(run(tiny_pipeline, other), plain)

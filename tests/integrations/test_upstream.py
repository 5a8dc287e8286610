"""LatentSync's own pipeline, by a stand-in: its loop is honoured, the runtime reaches into it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from upstream_standin import (
    DeepCacheSDHelper,
    Detector,
    LipsyncPipeline,
    OneConvolution,
    StandInUNet,
    clip,
)

from lsync_compile.compiled import CompiledPipeline
from lsync_compile.errors import OptionError
from lsync_compile.integrations import adapter_for
from lsync_compile.integrations.upstream import UPSTREAM
from lsync_compile.report import GraphRecord

BITS = {"lowering": "eager", "guidance_prefix": False, "null_audio": False, "compile_vae": False}
ALL = {
    "lowering": "eager",
    "kernels": "on",
    "split_conv_in": True,
    "fuse_upsample_conv": True,
    "fuse_layer_norm": True,
}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def plain() -> Tensor:
    """What the pipeline gives for two chunks of two frames in four steps."""
    return LipsyncPipeline()(*clip())


def compiled(pipeline: LipsyncPipeline, **options: object) -> CompiledPipeline:
    return torch.compile(pipeline, backend="lsync", options={"preset": "exact", **options})


def unet_graphs(fast: CompiledPipeline) -> list[GraphRecord]:
    return [graph for graph in fast.lsync.report().graphs if graph.target == "unet"]


def test_it_is_known_by_its_layout() -> None:
    assert adapter_for(LipsyncPipeline()) is UPSTREAM


def test_the_loop_is_honoured_bit_for_bit() -> None:
    """Two chunks, of which the second is shorter."""
    seen: dict[str, list] = {"plain": [], "fast": []}
    pipeline = LipsyncPipeline()
    plain = pipeline(*clip(3), callback=lambda j, t, _: seen["plain"].append((j, int(t))))
    fast = compiled(pipeline, **{**BITS, "compile_vae": True})
    result = fast(*clip(3), callback=lambda j, t, _: seen["fast"].append((j, int(t))))
    assert torch.equal(result, plain)
    assert seen["fast"] == seen["plain"]
    assert [j for j, _ in seen["fast"]] == [0, 1, 2, 3] * 2
    # Both chunks' sizes, each stage of each: computed once a chunk, the rest taken again.
    counts = fast.lsync.report().counters
    assert (counts["graphs"], counts["recompiles"], counts["breaks"]) == (6, 0, 0)
    for graph in unet_graphs(fast):
        found = {stage.name: (stage.computed, stage.reused) for stage in graph.stages}
        assert found == {"timestep": (4, 0), "chunk": (1, 3)}
    assert vars(pipeline).keys() - vars(LipsyncPipeline()).keys() == {
        *("generator", "image_processor", "_lsync_link")
    }
    # Nothing is compiled for other numbers of steps, or again.
    with torch._dynamo.config.patch(error_on_recompile=True):
        other = fast(*clip(3), num_inference_steps=3)
        pipeline.unet.to(torch.float64).to(torch.float32)  # other tensors with the same values
        assert torch.equal(fast(*clip(3)), plain)
    assert fast.lsync.undo() is pipeline
    assert torch.equal(pipeline(*clip(3), num_inference_steps=3), other)


def test_every_pass_finds_its_places(plain: Tensor) -> None:
    """Rearranged as einops does it, and with what follows from the loop vouched for."""
    fast = compiled(LipsyncPipeline(), **ALL)
    assert (fast(*clip()) - plain).abs().max() < 1e-4 * plain.abs().max()
    for graph in unet_graphs(fast):
        found = {record.name: record.matches for record in graph.passes if record.matches}
        wanted = {
            "null_audio": 2,
            "guidance_prefix": 40,
            "split_conv_in": 1,
            "fuse_group_norm_silu": 13,  # 4 residual blocks, 4 transformers, the last
            "fuse_temporal_attention": 4,
            "choose_sdpa": 4,
            "fuse_add_layer_norm": 7,
            "fuse_geglu": 4,
            "fuse_layer_norm": 5,
            "fuse_qkv": 8,
            "fuse_upsample_conv": 1,
            "channels_last": 12,
        }
        assert {name: found.get(name) for name in wanted} == wanted


def test_without_guidance_nothing_of_it_is_vouched_for() -> None:
    fast = compiled(LipsyncPipeline(OneConvolution), lowering="eager")
    result = fast(*clip(), guidance_scale=1.0)
    expected = LipsyncPipeline(OneConvolution)(*clip(), guidance_scale=1.0)
    assert torch.equal(result, expected)
    reasons = {r.name: r.reason for g in unet_graphs(fast) for r in g.passes}
    assert reasons["guidance_prefix"] == "nobody vouches that the batch is two equal halves"


def test_what_the_loop_is_expected_to_do_is_checked() -> None:
    """A copy of the repository that was changed: its halves are not equal."""

    class Changed(LipsyncPipeline):
        def prepare_mask_latents(self, *args: object) -> Tensor:
            made = super().prepare_mask_latents(*args)
            made[0] += 1
            return made

    fast = compiled(Changed(OneConvolution), lowering="eager")
    assert torch.equal(fast(*clip()), Changed(OneConvolution)(*clip()))
    assert "unet: guidance was expected of its inputs and does not hold" in str(fast.lsync.report())


def test_deep_features_belong_to_their_chunk(plain: Tensor) -> None:
    fast = compiled(LipsyncPipeline(), deep_cache=True, deep_cache_interval=2, **BITS)
    alone = fast(*clip())
    assert not torch.equal(alone, plain)
    every = compiled(fast, deep_cache=True, deep_cache_interval=1, **BITS)
    assert torch.equal(every(*clip()), plain)  # the same graphs
    fast = compiled(fast, deep_cache=True, deep_cache_interval=2, **BITS)
    assert (alone - plain).abs().max() < 0.5 * plain.abs().max()
    for graph in unet_graphs(fast):
        assert graph.deep_cache is not None
        assert (graph.deep_cache.computed, graph.deep_cache.reused) == (12, 4)
    # A run that others came before, of three steps and of one.
    for steps in (3, 1):
        fast(*clip(6), num_inference_steps=steps, seed=5)
        assert torch.equal(fast(*clip()), alone)

    def stop(step: int, *_: object) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fast(*clip(), seed=7, callback=stop)
    assert torch.equal(fast(*clip()), alone)
    assert "affine_transform_video" not in vars(fast.lsync.undo())


def test_equal_frames_are_searched_once_and_smoothed_each() -> None:
    expected = LipsyncPipeline(OneConvolution)(*clip(6, repeated=True))
    before = Detector.searches
    fast = compiled(LipsyncPipeline(OneConvolution), **BITS)
    assert torch.equal(fast(*clip(6, repeated=True)), expected)
    assert Detector.searches - before == 3
    assert fast.lsync.report().features["face cache"] == {"frames": 6, "exact": 3, "searched": 3}
    assert type(fast.image_processor.face_detector) is Detector
    off = compiled(fast, **BITS, face_cache=False)
    assert torch.equal(off(*clip(6, repeated=True)), expected)
    assert Detector.searches - before == 9


def test_the_mask_tells_what_is_generated() -> None:
    """Rows that are kept are not decoded; what is pasted over them is the clip's."""
    fast = compiled(
        LipsyncPipeline(OneConvolution), **{**BITS, "compile_vae": True}, crop_decode=True
    )
    plain, result = LipsyncPipeline(OneConvolution)(*clip()), fast(*clip())
    rows = plain.shape[-1] // 2
    assert torch.equal(result[:, :, :rows], plain[:, :, :rows])
    assert 0 < (result - plain).abs().max() < 0.1
    report = fast.lsync.report()
    assert report.features["multi_scale"] == {"rows": 4, "of_rows": 8}
    (decoder,) = [graph for graph in report.graphs if graph.target == "vae.decoder"]
    assert {r.name: r.matches for r in decoder.passes}["crop_decode"] == 9


def test_what_does_not_reach_its_loop_is_said(caplog: pytest.LogCaptureFixture) -> None:
    fast = compiled(LipsyncPipeline(OneConvolution), **BITS, few_steps=3, clip_cache=True)
    fast(*clip())
    notes = [note for note in fast.lsync.report().notes if note.startswith("option")]
    assert [note.split()[1] for note in notes] == ["few_steps", "clip_cache"]
    assert "ask for fewer num_inference_steps" in notes[0]
    assert caplog.text.count("option few_steps does nothing") == 1


def test_the_flag_for_deepcache_is_refused() -> None:
    pipeline = LipsyncPipeline(OneConvolution)
    DeepCacheSDHelper(pipe=pipeline).enable()
    with pytest.raises(OptionError, match=r"DeepCacheSDHelper.*helper.disable\(\)"):
        compiled(pipeline)


def test_its_unet_alone() -> None:
    """A bare module: exact, and nothing is known of steps."""
    unet = StandInUNet().eval().requires_grad_(False)
    inputs = torch.randn(2, 13, 4, 8, 8), torch.tensor(7), torch.randn(8, 5, 24)
    with torch.no_grad():
        expected = unet(*inputs).sample
        unet.compile(backend="lsync", options={"lowering": "eager"})
        assert torch.equal(unet(*inputs).sample, expected)

"""lip_attention: self-attention at the two largest levels, only where a region is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from captures import captured_unet
from fixtures import LatentSyncPipeline, RecordedChunk, denoise, mini, mouth_psnr, recorded_chunks
from passes.networks import ops, results, stable_diffusion_unet
from torch import Tensor
from torch.fx import GraphModule

import lsync_compile
from lsync_compile.graph.copying import copy_graph
from lsync_compile.media.mask import mouth_mask
from lsync_compile.options import Options
from lsync_compile.passes.lip_attention import OptimizedLipAttention
from lsync_compile.passes.manager import PassManager
from lsync_compile.passes.spec import registered
from lsync_compile.report import PassRecord
from lsync_compile.runtime.region import MouthRegion, make_region, mouth_region

__all__ = ["mini", "recorded_chunks"]  # fixtures

OP = "lsync.lip_attention.default"
REGION = make_region(mouth_mask(128), 16, pool=4)


def rewritten(
    gm: GraphModule, region: MouthRegion | None = REGION, target: str = "unet", **options: Any
) -> tuple[GraphModule, PassRecord]:
    copy = copy_graph(gm)
    alone = type(
        "Alone", (OptimizedLipAttention,), {"spec": replace(OptimizedLipAttention.spec, after=())}
    )
    with torch.no_grad():
        settings = Options(**{"lip_attention": True, **options})
        (record,) = PassManager(settings, [alone]).run(copy, target, "graph", region=region)
    copy.graph.lint()
    return copy, record


def lip_nodes(gm: GraphModule) -> list[Any]:
    target = torch.ops.lsync.lip_attention.default
    return [node for node in gm.graph.nodes if node.target is target]


def result(gm: GraphModule, inputs: list) -> Tensor:
    return results(gm, inputs)[0]


def test_the_real_unet() -> None:
    _, gm, inputs = captured_unet()
    before = ops(gm)["scaled_dot_product_attention"]
    after, record = rewritten(gm)
    # Down and up at 16x16 and 8x8: two and three layers each.
    assert record.matches == 10
    assert len(lip_nodes(after)) == 10
    assert ops(after)["scaled_dot_product_attention"] == before - 10
    for node in lip_nodes(after):
        assert node.args[4] == REGION.cells
        level = 16 // int(node.args[0].meta["example_value"].shape[1] ** 0.5)
        assert node.args[5:8] == (1, 4 // level, 4 // level)
        assert {each.target for each in node.args[:3]} == {torch.nn.functional.linear}
        assert {each.target for each in node.users} == {torch.nn.functional.linear}
    plain, changed = result(gm, inputs), result(after, inputs)
    assert changed.shape == plain.shape
    assert not torch.equal(changed, plain)
    assert rewritten(after)[1].matches == 0


def test_a_region_of_everything_is_plain_attention() -> None:
    _, gm, inputs = captured_unet()
    everything = make_region(torch.zeros(1, 16, 16), 16, pool=4)
    after, record = rewritten(gm, everything)
    assert record.matches == 10
    torch.testing.assert_close(result(after, inputs), result(gm, inputs), rtol=1e-4, atol=1e-4)


def test_options_say_how() -> None:
    _, gm, _ = captured_unet()
    after, _ = rewritten(gm, lip_pool="4", lip_halo=3, lip_weight=1.5)
    assert {node.args[5:9] for node in lip_nodes(after)} == {(3, 4, 4, 1.5), (2, 2, 2, 1.5)}


def test_levels_that_would_not_be_pooled_stay() -> None:
    _, gm, _ = captured_unet()
    after, record = rewritten(gm, lip_pool="2")  # one token of the second level
    assert record.matches == 5
    assert {node.args[5:9] for node in lip_nodes(after)} == {(1, 2, 2, 1.0)}


def test_projections_are_still_joined() -> None:
    _, gm, _ = captured_unet()
    after, _ = rewritten(gm)
    with torch.no_grad():
        _, record = PassManager(
            Options(kernels="on"),
            [registered()["fuse_temporal_attention"], registered()["fuse_qkv"]],
        ).run(after, "unet", "graph")
    assert record.matches > 0
    assert all(len(node.all_input_nodes) == 3 for node in lip_nodes(after))
    assert all("getitem" in each.name for n in lip_nodes(after) for each in n.args[:3])


@pytest.mark.parametrize(
    ("options", "region", "reason"),
    [
        ({}, None, "no run says which region it generates"),
        ({"lip_pool": "1"}, REGION, "nothing is pooled or weighted"),
        ({}, make_region(mouth_mask(128), 16), "nothing is pooled or weighted"),
    ],
)
def test_vetoes(options: dict, region: MouthRegion | None, reason: str) -> None:
    _, gm, _ = captured_unet()
    record = rewritten(gm, region, **options)[1]
    assert (record.outcome, record.reason) == ("vetoed", reason)


def test_other_networks_stay_as_they_are() -> None:
    gm, _ = stable_diffusion_unet()
    assert rewritten(gm, target="module")[1].outcome == "not for this graph"
    other = make_region(mouth_mask(96), 12, pool=4)  # levels of 12 and 6, which this has not
    assert rewritten(gm, other)[1].outcome == "no match"


def test_quality_with_the_trained_model(
    mini: LatentSyncPipeline, recorded_chunks: list[RecordedChunk]
) -> None:
    """Far above the bar of `balanced`, 35 dB; without a region the option changes nothing."""
    chunk, region = recorded_chunks[-1], make_region(mini.mask, 32, pool=4)
    with torch.no_grad():
        fast = lsync_compile.compile(mini, lowering="eager", lip_attention=True, compile_vae=False)
        try:
            fast.lsync.settle()
            with mouth_region(region):
                latents = denoise(mini, chunk)
            report = fast.lsync.report()
        finally:
            fast.lsync.undo()
    done = {record.name: record.matches for record in report.graphs[0].passes}
    assert done["lip_attention"] == 6
    assert mouth_psnr(mini, chunk, latents) > 45

"""crop_encode: masked pictures come out nearly as before, from the rows that are masked."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from captures import capture
from fixtures import LatentSyncPipeline, RecordedChunk, mini, recorded_chunks
from passes.networks import distance, make_vae, ops, results, vae_decoder
from torch import Tensor
from torch.fx import GraphModule

from lsync_compile.graph.copying import copy_graph
from lsync_compile.options import Options
from lsync_compile.passes.crop_encode import CropEncode
from lsync_compile.passes.manager import PassManager
from lsync_compile.report import PassRecord
from lsync_compile.runtime.region import MouthRegion, make_region

__all__ = ["mini", "recorded_chunks"]  # fixtures

SIDE, PIXELS = 16, 128


def mask(first: int, after: int, side: int = SIDE) -> Tensor:
    """(1, R, R) with these rows of latents masked."""
    kept = torch.ones(1, side * 8, side * 8)
    kept[:, first * 8 : after * 8] = 0
    return kept


def region(first: int, after: int, side: int = SIDE) -> MouthRegion:
    found = make_region(mask(first, after, side), side)
    assert found is not None
    return found


def rewritten(
    gm: GraphModule, where: MouthRegion | None, target: str = "vae.encoder", **options: Any
) -> tuple[GraphModule, PassRecord]:
    copy = copy_graph(gm)
    with torch.no_grad():
        settings = Options(**{"crop_encode": True, **options})
        (record,) = PassManager(settings, [CropEncode]).run(copy, target, "graph", region=where)
    copy.graph.lint()
    return copy, record


def result(gm: GraphModule, inputs: list) -> Tensor:
    (moments,) = results(gm, inputs)
    return moments


def faces(count: int) -> Tensor:
    """Smooth pictures in [-1, 1], one much like the other."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 8, 8, generator=generator)
    coarse = coarse + 0.05 * torch.rand(count, 3, 8, 8, generator=generator)
    return 2 * torch.nn.functional.interpolate(coarse, size=(PIXELS, PIXELS), mode="bilinear") - 1


@functools.cache
def encoder(pairs: int = 3, first: int = 8, after: int = 12) -> tuple[GraphModule, list]:
    plain = faces(pairs)
    with torch.no_grad():
        return capture(make_vae().encoder, torch.cat([plain * mask(first, after), plain]))


def test_rows_are_cropped() -> None:
    gm, inputs = encoder()
    after, record = rewritten(gm, region(8, 12))
    assert record.matches == ops(gm)["group_norm"] - 6  # all but the middle's and the last
    assert ops(after)["group_norm"] == ops(gm)["group_norm"]  # those of the cropped rows are inline
    whole, cropped = result(gm, inputs), result(after, inputs)
    assert cropped.shape == whole.shape
    # Nothing is changed of the plain pictures, nor of the first masked one.
    torch.testing.assert_close(cropped[3:], whole[3:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cropped[0], whole[0], rtol=1e-4, atol=1e-4)
    # The others are nearer to what they were than to the plain ones.
    assert 0 < distance(cropped[1:3], whole[1:3]) < 0.5 * distance(whole[4:6], whole[1:3])


def test_equal_pictures_come_out_nearly_equal() -> None:
    """With the first one's statistics right for all, what is left is the halo's."""
    gm, inputs = encoder()
    plain = faces(1).expand(3, -1, -1, -1)
    pictures = torch.cat([plain * mask(8, 12), plain])
    inputs = [pictures if each.shape == pictures.shape else each for each in inputs]
    whole = result(gm, inputs)[1:3, :, 8:12]
    errors = []
    for halo in (0, 2, 3):
        after, _ = rewritten(gm, region(8, 12), crop_halo=halo)
        errors.append(distance(result(after, inputs)[1:3, :, 8:12], whole))
    assert 10 * errors[2] < 5 * errors[1] < 4 * errors[0]


@pytest.mark.parametrize(
    ("pairs", "where", "reason"),
    [
        (3, None, "no run says which region it masks"),
        (3, region(1, 15), "16 of 16 rows are masked"),
        (3, region(8, 12, 32), "the region has 32 rows of latents, the picture 16"),
        (1, region(8, 12), "2 pictures are no two pairs"),
    ],
)
def test_vetoes(pairs: int, where: MouthRegion | None, reason: str) -> None:
    gm, _ = encoder(pairs)
    _, record = rewritten(gm, where)
    assert (record.outcome, record.reason) == ("vetoed", reason)


def test_other_networks_stay_as_they_are() -> None:
    gm, _ = vae_decoder()
    assert rewritten(gm, region(8, 12), "vae.decoder")[1].outcome == "not for this graph"
    assert rewritten(gm, region(8, 12))[1].reason == (
        "the encoder is not laid out like Stable Diffusion's"
    )


def test_quality_with_the_trained_model(
    mini: LatentSyncPipeline, recorded_chunks: list[RecordedChunk]
) -> None:
    """Latents of masked faces, against encoding all; a posterior's own spread is 6 %."""
    latents = recorded_chunks[0].latents[0].transpose(0, 1)[[0, 5, 15]]
    with torch.no_grad():
        plain = mini.vae.decode(latents / mini.vae.config.scaling_factor).sample.clamp(-1, 1)
        gm, inputs = capture(mini.vae.encoder, torch.cat([plain * mini.mask, plain]))

        def means(gm: GraphModule) -> Tensor:
            moments: Tensor = mini.vae.quant_conv(result(gm, inputs))
            return moments[:, :4]

        after, record = rewritten(gm, make_region(mini.mask, 32))
        assert record.matches > 0
        whole, cropped = means(gm), means(after)
    assert distance(cropped[1:3], whole[1:3]) < 0.04
    torch.testing.assert_close(cropped[3:], whole[3:], rtol=1e-3, atol=1e-3)

"""crop_decode: the generated rows come out nearly as before, with statistics of each kind."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captures import capture
from fixtures import LatentSyncPipeline, RecordedChunk, mini, recorded_chunks
from passes.networks import distance, make_vae, ops, results, vae_encoder
from torch import Tensor
from torch.fx import GraphModule

from lsync_compile.graph.copying import copy_graph
from lsync_compile.graph.rows import norm_as_of, norm_with_rows
from lsync_compile.options import Options
from lsync_compile.passes.crop_decode import CropDecode
from lsync_compile.passes.manager import PassManager
from lsync_compile.report import PassRecord
from lsync_compile.runtime.region import MouthRegion, make_region

__all__ = ["mini", "recorded_chunks"]  # fixtures

STATISTICS = ("own", "first", "both")


def region(first: int, after: int, side: int = 16) -> MouthRegion:
    mask = torch.ones(side, side)
    mask[first:after] = 0
    found = make_region(mask, side)
    assert found is not None
    return found


def rewritten(
    gm: GraphModule, where: MouthRegion | None, target: str = "vae.decoder", **options: Any
) -> tuple[GraphModule, PassRecord]:
    copy = copy_graph(gm)
    with torch.no_grad():
        settings = Options(**{"crop_decode": True, **options})
        (record,) = PassManager(settings, [CropDecode]).run(copy, target, "graph", region=where)
    copy.graph.lint()
    return copy, record


def result(gm: GraphModule, inputs: list) -> Tensor:
    (pictures,) = results(gm, inputs)
    return pictures


@functools.cache
def decoder(pictures: int = 3) -> tuple[GraphModule, list]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 16, 16, generator=generator).expand(pictures, -1, -1, -1)
    latents = latents + 0.1 * torch.randn(pictures, 4, 16, 16, generator=generator)
    with torch.no_grad():
        return capture(make_vae().decoder, latents)


@pytest.mark.parametrize("statistics", STATISTICS)
def test_rows_are_cropped(statistics: str) -> None:
    gm, inputs = decoder()
    after, record = rewritten(gm, region(8, 12), crop_statistics=statistics)
    assert record.matches == 25  # three residual blocks of two norms on four levels, and the last
    norms = ops(gm)["group_norm"]
    # Those of the middle stay; the first picture's are beside them, or the cropped ones instead.
    assert ops(after)["group_norm"] == norms
    plain, cropped = result(gm, inputs), result(after, inputs)
    assert cropped.shape == plain.shape
    factor = plain.shape[2] // 16
    top, bottom = (8 - 1) * factor, (12 + 1) * factor
    pictures = slice(0 if statistics == "own" else 1, None)
    assert not cropped[pictures, :, :top].any()
    assert not cropped[pictures, :, bottom:].any()
    assert cropped[:, :, 8 * factor : 12 * factor].all()
    if statistics != "own":
        torch.testing.assert_close(cropped[0], plain[0], rtol=1e-4, atol=1e-4)


def test_the_rows_of_the_middle_are_exact_where_statistics_are() -> None:
    """The same picture thrice, a wide halo: what the first one lends is right."""
    gm, inputs = decoder()
    inputs = [x[:1].expand_as(x).contiguous() if x.shape[1:] == (4, 16, 16) else x for x in inputs]
    plain = result(gm, inputs)
    assert torch.equal(plain[0], plain[1])
    factor = plain.shape[2] // 16
    rows = slice(9 * factor, 11 * factor)
    errors = {}
    for statistics in STATISTICS:
        after, _ = rewritten(gm, region(9, 11), crop_halo=4, crop_statistics=statistics)
        errors[statistics] = distance(result(after, inputs)[:, :, rows], plain[:, :, rows])
    # What is left is the halo's: a row sees further than that with random weights.
    assert errors["first"] < 0.04
    assert errors["both"] < 0.8 * errors["own"]


def test_norms_of_parts() -> None:
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(1, 8, 10, 6, generator=generator) + torch.arange(10.0)[:, None]
    weight, bias = torch.randn(2, 8, generator=generator)
    expected = F.group_norm(whole, 2, weight, bias, 1e-5)
    rows = whole[:, :, 3:7]
    found = norm_with_rows(rows, whole, weight, bias, 2, 1e-5, (3, 7, 10))
    torch.testing.assert_close(found, expected[:, :, 3:7], rtol=1e-4, atol=1e-4)
    found = norm_as_of(rows, whole, weight, bias, 2, 1e-5)
    torch.testing.assert_close(found, expected[:, :, 3:7], rtol=1e-4, atol=1e-4)
    # Brighter rows in another picture: `both` sees them, `first` does not.
    other = whole.clone()
    other[:, :, 3:7] += 5
    expected = F.group_norm(other, 2, weight, bias, 1e-5)[:, :, 3:7]
    found = norm_with_rows(other[:, :, 3:7], whole, weight, bias, 2, 1e-5, (3, 7, 10))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found = norm_as_of(other[:, :, 3:7], whole, weight, bias, 2, 1e-5)
    assert (found - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("pictures", "where", "options", "reason"),
    [
        (3, None, {}, "no run says which region it generates"),
        (3, region(1, 15), {}, "16 of 16 rows are generated"),
        (3, region(8, 12, 32), {}, "the region has 32 rows of latents, the picture 16"),
        (1, region(8, 12), {}, "a single picture has no other's statistics"),
    ],
)
def test_vetoes(pictures: int, where: MouthRegion | None, options: dict, reason: str) -> None:
    gm, _ = decoder(pictures)
    _, record = rewritten(gm, where, **options)
    assert (record.outcome, record.reason) == ("vetoed", reason)


def test_other_networks_stay_as_they_are() -> None:
    gm, _ = vae_encoder()
    assert rewritten(gm, region(8, 12), "vae.encoder")[1].outcome == "not for this graph"
    _, record = rewritten(gm, region(8, 12))
    assert record.reason == "the decoder is not laid out like Stable Diffusion's"


@pytest.mark.parametrize(("statistics", "least"), [("own", 42), ("first", 45), ("both", 52)])
def test_quality_with_the_trained_model(
    mini: LatentSyncPipeline, recorded_chunks: list[RecordedChunk], statistics: str, least: float
) -> None:
    """PSNR of the generated region against decoding all; the codec's own loss is at 44 dB."""
    latents = recorded_chunks[0].latents[0].transpose(0, 1)[[0, 5, 15]]
    latents = latents / mini.vae.config.scaling_factor
    where = make_region(mini.mask, 32)
    with torch.no_grad():
        gm, inputs = capture(mini.vae.decoder, mini.vae.post_quant_conv(latents))
    after, record = rewritten(gm, where, crop_statistics=statistics)
    assert record.matches > 0
    generated = (mini.mask < 0.5)[0]

    def mouth(pictures: Tensor) -> Tensor:
        return (pictures / 2 + 0.5).clamp(0, 1)[1:][:, :, generated]

    error = (mouth(result(after, inputs)) - mouth(result(gm, inputs))).square().mean()
    assert -10 * error.log10() > least

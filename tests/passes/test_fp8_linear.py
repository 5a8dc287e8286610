"""fp8_linear: every large layer of real networks, and no small one."""

from __future__ import annotations

from collections.abc import Callable

import networks
import pytest
import torch
import torch.nn.functional as F
from captures import capture
from fixtures import LatentSyncPipeline, RecordedChunk, denoise, mini, mouth_psnr, recorded_chunks
from torch import Tensor
from torch.fx import GraphModule

import lsync_compile
from lsync_compile.graph.staging import Stage, cut
from lsync_compile.passes import fp8_linear as module
from lsync_compile.passes.fp8_linear import OP, ROWS, Fp8Linear
from lsync_compile.report import PassRecord

__all__ = ["mini", "recorded_chunks"]


def rounded(gm: GraphModule) -> tuple[GraphModule, PassRecord]:
    return networks.run_pass(gm, Fp8Linear, fp8_linear=True)


@pytest.mark.parametrize(
    ("network", "rows", "count"),
    [
        # Just more than its sound has, 8 frames of 50: the upper two of four levels, each with 5
        # transformers and 5 motion modules of 20 products together.
        (networks.latentsync_unet, 401, 2 * 5 * 20),
        # Just more than its text has: all 15 transformers but the middle one's, 8 each.
        (networks.stable_diffusion_unet, 15, 15 * 8),
    ],
)
def test_real_networks(
    network: Callable, rows: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their pictures are small here, and the threshold is lowered as much."""
    gm, inputs = network()
    monkeypatch.setattr(module, "ROWS", rows)
    after, record = rounded(gm)
    assert (record.outcome, record.matches) == ("applied", count)
    gone = networks.ops(gm) - networks.ops(after)
    assert gone["linear"] == count
    (one,), (other,) = networks.results(after, inputs), networks.results(gm, inputs)
    # Noise in every matrix, where a trained network's branches add little to what they are given.
    assert 1e-3 < networks.distance(one, other) < 0.2
    assert rounded(after)[1].outcome == "no match"


X, W, B = torch.randn(2, ROWS // 2, 32), torch.randn(48, 32), torch.randn(48)


def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w, b)


def without_bias(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w)


def joined_weights(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, torch.cat([w, w]), torch.cat([b, b]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", [layer, without_bias, joined_weights])
def test_what_is_taken(function: Callable, dtype: torch.dtype) -> None:
    values = [value.to(dtype) for value in (X, W, B)]
    gm, inputs = capture(function, *values)
    after, record = rounded(gm)
    assert record.matches == 1
    assert sum(node.target is OP for node in after.graph.nodes) == 1
    exact = function(*(value.double() for value in values))
    assert networks.distance(after(*inputs)[0], exact) < 0.05


def test_weights_are_rounded_once() -> None:
    """All that the weight alone decides leaves the main graph."""

    class Layer(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    with torch.no_grad():
        gm, _ = capture(Layer(32, 48), X)
        after, _ = rounded(gm)
    staging = cut(after, [Stage.WEIGHTS], unet=True)
    assert staging is not None
    assert networks.ops(staging.stages[Stage.WEIGHTS].gm)["amax"] == 1
    assert not {"amax", "float", "to"} & networks.ops(staging.main.gm).keys()


def few_rows(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x[:, 1:], w, b)


def odd_width(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x[..., 1:], w[:, 1:], b)


def odd_result(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w[1:], b[1:])


def one_row(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w[0])


@pytest.mark.parametrize("function", [few_rows, odd_width, odd_result, one_row])
def test_it_does_not_fire(function: Callable) -> None:
    gm, _ = capture(function, X, W, B)
    after, record = rounded(gm)
    assert record.outcome == "no match"
    assert networks.ops(after) == networks.ops(gm)


@pytest.mark.slow
def test_quality_with_the_trained_model(
    mini: LatentSyncPipeline, recorded_chunks: list[RecordedChunk]
) -> None:
    """Above the bar of `balanced`, 35 dB, with every layer rounded that is large enough here."""
    chunk = recorded_chunks[-1]
    options = {"preset": "exact", "lowering": "eager", "kernels": "on", "compile_vae": False}
    with torch.no_grad():
        fast = lsync_compile.compile(mini, fp8_linear=True, fuse_linear_geglu=False, **options)
        try:
            latents = denoise(mini, chunk)
            report = fast.lsync.report()
        finally:
            fast.lsync.undo()
    done = {record.name: record.matches for record in report.graphs[0].passes}
    assert done["fp8_linear"] == 60
    assert 40 < mouth_psnr(mini, chunk, latents) < 70

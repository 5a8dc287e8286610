"""fuse_layer_norm: every norm that no sum precedes, with and without the frames' numbers."""

from __future__ import annotations

from collections.abc import Callable

import networks
import pytest
import torch
import torch.nn.functional as F
from captures import capture
from torch import Tensor
from torch.fx import GraphModule

from lsync_compile.graph.copying import copy_graph
from lsync_compile.options import Options
from lsync_compile.passes.fuse_add_layer_norm import FuseAddLayerNorm
from lsync_compile.passes.fuse_layer_norm import OP, FuseLayerNorm
from lsync_compile.passes.fuse_temporal_attention import FuseTemporalAttention
from lsync_compile.passes.manager import PassManager
from lsync_compile.report import PassRecord

X, W, P = torch.randn(6, 5, 8), torch.randn(8), torch.randn(1, 24, 8)


def fused(gm: GraphModule) -> tuple[GraphModule, PassRecord]:
    return networks.run_pass(gm, FuseLayerNorm, fuse_layer_norm=True)


def positions(gm: GraphModule) -> int:
    """How many take the frames' numbers."""
    return sum(node.target is OP and len(node.args) == 5 for node in gm.graph.nodes)


@pytest.mark.parametrize(
    ("network", "before", "count", "with_position"),
    [
        # One in each of 16 transformers and of 20 motion modules, these with numbers.
        (networks.latentsync_unet, 108, 36, 20),
        (networks.stable_diffusion_unet, 48, 16, 0),
    ],
)
def test_what_the_sums_leave(
    network: Callable, before: int, count: int, with_position: int
) -> None:
    gm, inputs = network()
    assert networks.ops(gm)["layer_norm"] == before
    copy = copy_graph(gm)
    options = Options(kernels="on", fuse_layer_norm=True)
    passes = [FuseTemporalAttention, FuseAddLayerNorm, FuseLayerNorm]
    with torch.no_grad():
        records = PassManager(options, passes).run(copy, "unet", "graph")
    assert [record.matches for record in records][1:] == [before - count, count]
    assert positions(copy) == with_position
    assert "layer_norm" not in networks.ops(copy)
    (one,), (other,) = networks.results(copy, inputs), networks.results(gm, inputs)
    assert networks.distance(one, other) < 1e-5
    assert fused(copy)[1].outcome == "no match"


def norm(t: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm(t, (8,), w, w, 1e-3)


def alone(x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    return norm(x.sin(), w)


def rows_of_frames(x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    table = p[:, :3].reshape(3, 1, -1)
    return (norm(x, w).unflatten(0, (2, 3)) + table).flatten(0, 1).cos()


def rows_of_positions(x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    return (p[:, :5] + norm(x, w)).cos()


def norm_used_twice(x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    n = norm(x, w)
    return (n + p[:, :5]) * n


def four_dimensions(x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    return norm(x[None], w) + p[:, :5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("function", "with_position"),
    [
        (alone, 0),
        (rows_of_frames, 1),
        (rows_of_positions, 1),
        (norm_used_twice, 0),
        (four_dimensions, 0),
    ],
)
def test_how_much_is_taken(function: Callable, with_position: int, dtype: torch.dtype) -> None:
    values = [value.to(dtype) for value in (X, W, P)]
    gm, inputs = capture(function, *values)
    after, record = fused(gm)
    assert record.matches == 1
    assert positions(after) == with_position
    assert "layer_norm" not in networks.ops(after)
    exact = function(*(value.double() for value in values))
    bound = {torch.float32: 1e-6}.get(dtype, 1.01 * networks.distance(gm(*inputs)[0], exact))
    assert networks.distance(after(*inputs)[0], exact) <= bound


def two_dimensions(x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    return F.layer_norm(x, (5, 8), p[0, :5], p[0, :5])


def no_weights(x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    return F.layer_norm(x, (8,))


def double(x: Tensor, w: Tensor, p: Tensor) -> Tensor:
    return norm(x.double(), w.double())


@pytest.mark.parametrize("function", [two_dimensions, no_weights, double])
def test_it_does_not_fire(function: Callable) -> None:
    gm, _ = capture(function, X, W, P)
    after, record = fused(gm)
    assert record.outcome == "no match"
    assert networks.ops(after) == networks.ops(gm)

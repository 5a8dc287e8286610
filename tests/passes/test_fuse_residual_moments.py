"""fuse_residual_moments: every norm of a sum in real networks, and no other."""

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
from lsync_compile.graph.match import argument
from lsync_compile.options import Options
from lsync_compile.passes.fuse_group_norm_silu import FuseGroupNormSilu
from lsync_compile.passes.fuse_residual_moments import (
    NORM_FROM_MOMENTS,
    OP,
    FuseResidualMoments,
)
from lsync_compile.passes.manager import PassManager
from lsync_compile.report import PassRecord


def normed(gm: GraphModule) -> GraphModule:
    """The graph with the norms that the pass looks for."""
    return networks.run_pass(gm, FuseGroupNormSilu)[0]


def fused(gm: GraphModule) -> tuple[GraphModule, PassRecord]:
    return networks.run_pass(gm, FuseResidualMoments, fuse_residual_moments=True)


@pytest.mark.parametrize(
    ("network", "count", "sums"),
    [
        # All but the second norms of 22 residual blocks
        (networks.latentsync_unet, 81 - 22, 62),
        (networks.stable_diffusion_unet, 61 - 22, 42),
        (networks.vae_encoder, 22 - 10 - 1, 11),  # the attention's norm is of a sequence
        (networks.vae_decoder, 30 - 14 - 1, 15),
    ],
)
def test_real_networks(network: Callable, count: int, sums: int) -> None:
    gm, inputs = network()
    before = normed(gm)
    after, record = fused(before)
    assert (record.outcome, record.matches) == ("applied", count)
    new, gone = (networks.ops(a) - networks.ops(b) for a, b in ((after, before), (before, after)))
    assert new["group_norm_from_moments.default"] == gone["group_norm_silu.default"] == count
    assert new["residual_moments.default"] == sums
    assert gone["add"] > sums / 2
    (one,), (other,) = networks.results(after, inputs), networks.results(gm, inputs)
    assert networks.distance(one, other) < 1e-5
    assert one.stride() == other.stride()
    assert fused(after)[1].outcome == "no match"


def test_no_convolution_before_a_norm_keeps_its_bias() -> None:
    """cuDNN would add it in a pass of its own."""
    gm, _ = networks.latentsync_unet()
    after, _ = fused(normed(gm))
    kept = [n for n in after.graph.nodes if n.target is F.conv2d and n.args[2] is not None]
    # The entrances of 16 transformers, which layer norms follow, and the network's result.
    sides = [node.args[1].meta["example_value"].shape[-1] for node in kept]
    assert sides == [1] * 16 + [3]


def test_the_layout_of_convolutions_goes_through() -> None:
    """channels_last takes away the copies before the op's convolutions, as before sums'."""
    gm, _ = networks.latentsync_unet()
    counts = []
    for on in (False, True):
        copy = copy_graph(gm)
        with torch.no_grad():
            PassManager(Options(kernels="on", fuse_residual_moments=on)).run(copy, "unet", "graph")
        counts.append(networks.ops(copy)["contiguous"])
    assert counts[0] == counts[1]


X, R, W = torch.randn(4, 8, 6, 5), torch.randn(4, 8, 6, 5), torch.rand(8)
V = torch.randn(8, 8, 3, 3)


def norm(x: Tensor, w: Tensor) -> Tensor:
    return F.group_norm(x, 2, w, w, 1e-3)


def video_of(x: Tensor) -> Tensor:
    return x.view(2, 2, 8, 6, 5).transpose(1, 2)


def plain_sum(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    s = x + r
    return F.silu(norm(s, w)) + s


def two_convolutions(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    one, two = F.conv2d(x, v, w, padding=1), F.conv2d(r, v, bias=w * 2, padding=1)
    return norm(video_of(one) + video_of(two), w)


def pictures_of_a_video(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    s = video_of(x) + video_of(F.conv2d(r, v, w, padding=1))
    return norm(s.transpose(1, 2).flatten(0, 1), w) + s.transpose(1, 2).flatten(0, 1)


def video_of_pictures(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return norm(video_of(x + r), w)


def convolution_seen_twice(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    s = F.conv2d(x, v, w, stride=2)
    return norm(s, w) + s


def convolution_doubled(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    h = F.conv2d(x, v, w, padding=1)
    s = h + h
    return norm(s, w) + s


def convolution_seen_by_others(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    h = F.conv2d(x, v, w, padding=1)
    return norm(h + r, w) * h


def joined(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    s = x + r
    c = torch.cat([s, s * 2 + x], dim=1)
    return norm(c, torch.cat([w, w])) * c


def one_sum_joined_with_itself(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    s = x + r
    return norm(torch.cat([s, s], -3), torch.cat([w, w]))


def two_norms(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    s = x + r
    return norm(s, w).flatten(0, 1) + norm(video_of(s), w).transpose(1, 2).flatten(0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("function", "norms", "sums"),
    [
        (plain_sum, 1, 1),
        (two_convolutions, 1, 1),
        (pictures_of_a_video, 1, 1),
        (video_of_pictures, 1, 1),
        (convolution_seen_twice, 1, 1),
        (joined, 1, 2),
        (one_sum_joined_with_itself, 1, 1),
        (two_norms, 2, 1),
    ],
)
def test_what_is_taken(function: Callable, norms: int, sums: int, dtype: torch.dtype) -> None:
    values = [value.to(dtype) for value in (X, R, W, V)]
    gm, inputs = capture(function, *values)
    before = normed(gm)
    after, record = fused(before)
    assert record.matches == norms
    targets = [node.target for node in after.graph.nodes]
    assert (targets.count(NORM_FROM_MOMENTS), targets.count(OP)) == (norms, sums)
    convolutions = [node for node in after.graph.nodes if node.target is F.conv2d]
    assert all(argument(node, 2, "bias") is None for node in convolutions)
    exact = function(*(value.double() for value in values))
    new, old = (networks.distance(each(*inputs)[0], exact) for each in (after, gm))
    # A convolution is rounded before its bias, as in torch's GPU kernels.
    assert new <= {torch.float32: 1e-6}.get(dtype, 2 * old)


@pytest.mark.parametrize("function", [convolution_doubled, convolution_seen_by_others])
def test_a_bias_that_is_due_elsewhere_or_twice_stays(function: Callable) -> None:
    gm, inputs = capture(function, X, R, W, V)
    after, record = fused(normed(gm))
    assert record.matches == 1
    (op,) = (node for node in after.graph.nodes if node.target is OP)
    assert op.args[2] is None
    torch.testing.assert_close(after(*inputs)[0], gm(*inputs)[0], rtol=1e-5, atol=1e-5)


def broadcast(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return norm(x + r[:, :, :1], w)


def scaled(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return norm(torch.add(x, r, alpha=2), w)


def frames_mixed(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return norm((x + r).view(2, 2, 8, 6, 5).transpose(0, 1).flatten(0, 1), w)


def channels_mixed(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return norm((x + r).view(4, 2, 4, 6, 5).transpose(1, 2).flatten(1, 2), w)


def rows_mixed(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return norm((x + r).view(4, 8, 5, 6), w)


def joined_with_a_product(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    s = x + r
    return norm(torch.cat([s, x * 2], 1), torch.cat([w, w]))


def joined_by_frames(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return norm(torch.cat([x + r, x + r * 2]), w)


def the_norm_s_own_convolution(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return norm(F.conv2d(x, v, w), w)


def sequence(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return norm((x + r).flatten(2), w)


@pytest.mark.parametrize(
    "function",
    [
        broadcast,
        scaled,
        frames_mixed,
        channels_mixed,
        rows_mixed,
        joined_with_a_product,
        joined_by_frames,
        the_norm_s_own_convolution,
        sequence,
    ],
)
def test_it_does_not_fire(function: Callable) -> None:
    gm, _ = capture(function, X, R, W, V)
    before = normed(gm)
    after, record = fused(before)
    assert record.outcome == "no match"
    assert networks.ops(after) == networks.ops(before)

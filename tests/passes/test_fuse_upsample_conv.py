"""fuse_upsample_conv: every upsampler of real networks, and no other convolution."""

from __future__ import annotations

from collections.abc import Callable

import networks
import pytest
import torch
import torch.nn.functional as F
from captures import capture
from torch import Tensor
from torch.fx import GraphModule

from lsync_compile.graph.staging import Stage, cut
from lsync_compile.passes.fuse_upsample_conv import OP, FuseUpsampleConv
from lsync_compile.report import PassRecord

X, W, B = torch.randn(2, 6, 4, 5), torch.randn(8, 6, 3, 3), torch.randn(8)


def fused(gm: GraphModule) -> tuple[GraphModule, PassRecord]:
    return networks.run_pass(gm, FuseUpsampleConv, fuse_upsample_conv=True)


@pytest.mark.parametrize(
    "network",
    [networks.latentsync_unet, networks.stable_diffusion_unet, networks.vae_decoder],
)
def test_real_networks(network: Callable) -> None:
    gm, inputs = network()
    after, record = fused(gm)
    assert (record.outcome, record.matches) == ("applied", 3)
    gone = networks.ops(gm) - networks.ops(after)
    assert (gone["conv2d"], gone["interpolate"]) == (3, 3)
    assert "interpolate" not in networks.ops(after)
    (one,), (other,) = networks.results(after, inputs), networks.results(gm, inputs)
    assert networks.distance(one, other) < 1e-5
    assert fused(after)[1].outcome == "no match"


def test_the_weights_are_summed_once() -> None:
    """All that the weight alone decides leaves the main graph."""
    gm, _ = networks.latentsync_unet()
    after, _ = fused(gm)
    staging = cut(after, [Stage.WEIGHTS], unet=True)
    assert staging is not None
    assert networks.ops(staging.stages[Stage.WEIGHTS].gm)["stack"] == 3
    assert "narrow" not in networks.ops(staging.main.gm)


def by_factor(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0), w, b, padding=1)


def by_size(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = F.interpolate(x, size=(8, 10), mode="nearest")
    return F.conv2d(y, w, b, (1, 1), (1, 1))


def viewed_between(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = F.interpolate(x, scale_factor=(2.0, 2.0), mode="nearest")
    y = y.view(1, 2, 6, 8, 10).transpose(1, 2).transpose(1, 2).flatten(0, 1)
    return F.conv2d(y, w, padding=1)


def video(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """As LatentSync's own code does it: enlarged with the frames inside, then convolved."""
    clip = x.view(1, 2, 6, 4, 5).transpose(1, 2)
    y = F.interpolate(clip, scale_factor=[1.0, 2.0, 2.0], mode="nearest")
    return F.conv2d(y.permute([0, 2, 1, 3, 4]).reshape([2, 6, 8, 10]), w, b, padding=1)


def video_by_size(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = F.interpolate(x.view(1, 2, 6, 4, 5).transpose(1, 2), size=(2, 8, 10))
    return F.conv2d(y.transpose(1, 2).flatten(0, 1), w, b, padding=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", [by_factor, by_size, viewed_between, video, video_by_size])
def test_what_is_taken(function: Callable, dtype: torch.dtype) -> None:
    values = [value.to(dtype) for value in (X, W, B)]
    gm, inputs = capture(function, *values)
    after, record = fused(gm)
    assert record.matches == 1
    assert sum(node.target is OP for node in after.graph.nodes) == 1
    exact = function(*(value.double() for value in values))
    new, old = (networks.distance(each(*inputs)[0], exact) for each in (after, gm))
    # Summed weights are rounded, and so is a window before its bias, as in torch's GPU kernels.
    assert new <= {torch.float32: 1e-6}.get(dtype, 2 * old)


def three_times(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=3.0), w, b, padding=1)


def one_direction(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(x, size=(8, 5)), w, b, padding=1)


def bilinear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="bilinear"), w, b, padding=1)


def strided(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0), w, b, stride=2, padding=1)


def no_margin(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0), w, b)


def one_by_one(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0), w[:, :, :1, :1], b)


def in_groups(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0), w[:, :3], b, padding=1, groups=2)


def used_again(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = F.interpolate(x, scale_factor=2.0)
    return F.conv2d(y, w, b, padding=1).sum() + y


def turned_between(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = F.interpolate(x, scale_factor=2.0).transpose(2, 3)
    return F.conv2d(y, w, b, padding=1)


def more_frames(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = F.interpolate(x.view(1, 2, 6, 4, 5).transpose(1, 2), scale_factor=2.0)
    return F.conv2d(y.transpose(1, 2).flatten(0, 1), w, b, padding=1)


def frames_outside(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    clip = torch.stack([x, x], 2)  # b c f h w
    y = F.interpolate(clip, scale_factor=(1.0, 2.0, 2.0))
    return F.conv2d(y.permute(2, 0, 1, 3, 4).flatten(0, 1), w, b, padding=1)


@pytest.mark.parametrize(
    "function",
    [
        more_frames,
        frames_outside,
        three_times,
        one_direction,
        bilinear,
        strided,
        no_margin,
        one_by_one,
        in_groups,
        used_again,
        turned_between,
    ],
)
def test_it_does_not_fire(function: Callable) -> None:
    gm, _ = capture(function, X, W, B)
    after, record = fused(gm)
    assert record.outcome == "no match"
    assert networks.ops(after) == networks.ops(gm)

"""pad_channels: convolutions of 13 channels, as LatentSync's UNet begins with, and few others."""

from __future__ import annotations

from collections.abc import Callable

import networks
import pytest
import torch
import torch.nn.functional as F
from captures import capture, make_unet, unet_inputs
from torch import Tensor, nn
from torch.fx import GraphModule

from lsync_compile.graph.copying import copy_graph
from lsync_compile.options import Options
from lsync_compile.passes.manager import PassManager
from lsync_compile.passes.pad_channels import PadChannels
from lsync_compile.passes.spec import PassContext


def padded(gm: GraphModule, kernels: str = "on"):
    after = copy_graph(gm)
    with torch.no_grad():
        (record,) = PassManager(Options(kernels=kernels), [PadChannels]).run(
            after, "module", "graph"
        )
    after.graph.lint()
    return after, record


def convolution(channels: int, dtype: torch.dtype = torch.float16, **more: object):
    torch.manual_seed(0)
    module = nn.Conv2d(channels, 6, 3, **more).to(dtype).requires_grad_(False)
    return capture(module, torch.randn(2, channels, 9, 7).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [9, 13, 31])
@pytest.mark.parametrize(
    "more",
    [{}, {"bias": False}, {"stride": 2, "padding": 1}, {"padding": "same"}, {"dilation": 2}],
    ids=str,
)
def test_zeros_change_nothing(dtype: torch.dtype, channels: int, more: dict) -> None:
    gm, inputs = convolution(channels, dtype, **more)
    after, record = padded(gm)
    assert (record.outcome, record.matches) == ("applied", 1)
    (node,) = [node for node in after.graph.nodes if node.target is F.conv2d]
    assert node.args[0].meta["example_value"].shape[1] == -(-channels // 8) * 8
    torch.testing.assert_close(after(*inputs)[0], gm(*inputs)[0], rtol=1e-2, atol=1e-2)
    assert padded(after)[1].outcome == "no match"


@pytest.mark.parametrize(
    "make",
    [
        lambda: convolution(3),
        lambda: convolution(4),
        lambda: convolution(16),
        lambda: convolution(13, torch.float32),
        lambda: convolution(18, groups=2),
    ],
    ids=["three", "four", "sixteen", "float32", "groups"],
)
def test_it_does_not_fire(make: Callable) -> None:
    gm, _ = make()
    after, record = padded(gm)
    assert record.outcome == "no match"
    assert networks.ops(after) == networks.ops(gm)


def test_it_stays_away_from_writes_gradients_and_autocast() -> None:
    def written(x: Tensor) -> Tensor:
        y = x * 1.5
        y.clamp_(min=0.0)
        return module(y)

    module = nn.Conv2d(13, 6, 3).half().requires_grad_(False)
    x = torch.randn(2, 13, 9, 7).half()
    gm, inputs = capture(written, x)
    after, record = padded(gm)
    assert (record.outcome, record.reason) == ("vetoed", "the graph writes in place")
    assert torch.equal(after(*inputs)[0], written(x))

    def veto(gm: GraphModule) -> str:
        return PadChannels().veto(gm, PassContext(Options(kernels="on"), "module"))

    gm, _ = capture(module, x.requires_grad_())
    assert veto(gm).startswith("a gradient is wanted")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert veto(gm).startswith("autocast")


def test_a_cpu_gains_nothing() -> None:
    gm, _ = convolution(13)
    assert padded(gm, kernels="auto")[1].outcome == "no match"


def test_latentsync_s_entrance() -> None:
    """After the passes before it, in half precision."""
    inputs = [x.half() if x.is_floating_point() else x for x in unet_inputs().values()]
    with torch.no_grad():
        gm, _ = capture(make_unet(layers=1).half(), *inputs)
    after, record = padded(gm)
    assert record.matches == 1
    (entrance,) = [n for n in after.graph.nodes if n.target is F.pad and "weight" in str(n.args[0])]
    assert entrance.meta["example_value"].shape[1] == 16
    assert networks.ops(after)["conv2d"] == networks.ops(gm)["conv2d"]

"""fuse_feed_forward: the end of every transformer of real networks, and nothing that others see."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import networks
import pytest
import torch
import torch.nn.functional as F
from captures import capture
from torch import Tensor, nn
from torch.fx import GraphModule

from lsync_compile.graph.copying import copy_graph
from lsync_compile.options import Options
from lsync_compile.passes.fuse_add_layer_norm import FuseAddLayerNorm
from lsync_compile.passes.fuse_feed_forward import OP, FuseFeedForward
from lsync_compile.passes.fuse_linear_geglu import FuseLinearGeglu
from lsync_compile.passes.manager import PassManager
from lsync_compile.passes.remove_noops import RemoveNoops

BEFORE = (RemoveNoops, FuseAddLayerNorm, FuseLinearGeglu)
NAMES = [cls.spec.name for cls in (*BEFORE, FuseFeedForward)]


def fused(gm: GraphModule, **options: object):
    """The graph after the passes that it follows, and after itself; its record."""
    passes = []
    for index, cls in enumerate((*BEFORE, FuseFeedForward)):
        first = cls is RemoveNoops  # which drops what dropout leaves; of another phase
        spec = replace(cls.spec, after=() if first else tuple(NAMES[1:index]))
        passes.append(type(cls.__name__, (cls,), {"spec": spec}))
    before, after = copy_graph(gm), copy_graph(gm)
    chosen = {"kernels": "on", **dict.fromkeys(NAMES, True), **options}
    with torch.no_grad():
        PassManager(Options(**chosen), passes[:-1]).run(before, "module", "graph")
        *_, record = PassManager(Options(**chosen), passes).run(after, "module", "graph")
    after.graph.lint()
    return before, after, record


@pytest.mark.parametrize(
    ("network", "count", "convolutions"),
    [
        (networks.latentsync_unet, 36, 16),  # 16 transformers, 20 motion modules
        (networks.stable_diffusion_unet, 16, 16),
    ],
)
def test_real_networks(network: Callable, count: int, convolutions: int) -> None:
    gm, inputs = network()
    before, after, record = fused(gm)
    assert (record.outcome, record.matches) == ("applied", count)
    gone = networks.ops(before) - networks.ops(after)
    assert gone["linear"] == 2 * count - convolutions
    assert gone["conv2d"] == convolutions
    assert gone["add_layer_norm.default"] == gone["linear_geglu.default"] == count
    assert networks.ops(after)["feed_forward.default"] == count
    (one,), (other,) = networks.results(after, inputs), networks.results(gm, inputs)
    assert networks.distance(one, other) < 1e-5
    assert fused(after)[2].outcome == "no match"


class Block(nn.Module):
    """The end of a transformer within pictures, or with ``picture=False`` of a motion module."""

    def __init__(self, picture: bool = True, bias: bool = True, outside: int = 8) -> None:
        super().__init__()
        self.norm, self.picture = nn.LayerNorm(8), picture
        self.proj, self.out = nn.Linear(8, 64, bias=bias), nn.Linear(32, 8, bias=bias)
        last = nn.Conv2d(8, outside, 1, bias=bias) if picture else nn.Linear(8, outside, bias=bias)
        self.last = last
        self.requires_grad_(False)

    def parts(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The sum before the feed-forward, and the block's result."""
        total = x + residual
        value, gate = self.proj(self.norm(total)).chunk(2, dim=-1)
        return total, self.out(value * F.gelu(gate)) + total

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        _, y = self.parts(x, residual)
        if self.picture:
            y = y.transpose(1, 2).contiguous().view(-1, 8, 2, 3)
        return self.last(y).cos()


@pytest.mark.parametrize("picture", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outside", [8, 5])
def test_both_cases_with_and_without_biases(picture: bool, bias: bool, outside: int) -> None:
    module = Block(picture, bias, outside)
    gm, inputs = capture(module, torch.randn(4, 6, 8), torch.randn(4, 6, 8))
    _, after, record = fused(gm)
    assert record.matches == 1
    (node,) = [node for node in after.graph.nodes if node.target is OP]
    assert (node.args[8] is not None) == bias
    torch.testing.assert_close(after(*inputs)[0], gm(*inputs)[0])


class Guided(Block):
    """Half of what is added is a bias alone, as ``null_audio`` leaves it."""

    def __init__(self, other: bool = False) -> None:
        super().__init__()
        self.silent, self.other = nn.Parameter(torch.randn(8), requires_grad=False), other

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        half = x[len(x) // 2 :].sin()
        silent = self.silent.expand(*half.shape)
        parts = [half, silent] if self.other else [silent, half]
        return super().forward(torch.cat(parts), residual)


@pytest.mark.parametrize("other", [False, True], ids=["before", "behind"])
def test_rows_that_are_all_the_same_are_not_written_out(other: bool) -> None:
    gm, inputs = capture(Guided(other), torch.randn(4, 6, 8), torch.randn(4, 6, 8))
    _, after, record = fused(gm)
    assert record.matches == 1
    assert networks.ops(after)["expand"] == networks.ops(after)["cat"] - 1 == int(other)
    torch.testing.assert_close(after(*inputs)[0], gm(*inputs)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_less_exact(dtype: torch.dtype) -> None:
    module = Block().to(dtype)
    x, residual = torch.randn(2, 64, 6, 8, dtype=dtype)
    gm, inputs = capture(module, x, residual)
    _, after, record = fused(gm)
    assert record.matches == 1
    exact = copy.deepcopy(module).double()(x.double(), residual.double())
    new, old = (networks.distance(each(*inputs)[0], exact) for each in (after, gm))
    assert 0 < new < 1.1 * old


class SumUsedAgain(Block):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        total, y = self.parts(x, residual)
        return self.last(y.transpose(1, 2).reshape(-1, 8, 2, 3)).sum() + total


class ResultUsedAgain(Block):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        _, y = self.parts(x, residual)
        return self.last(y.transpose(1, 2).reshape(-1, 8, 2, 3)).sum() + y


class ScaledBetween(Block):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = 2 * self.parts(x, residual)[1]
        return self.last(y.transpose(1, 2).reshape(-1, 8, 2, 3))


class ChannelsMixed(Block):
    """The convolution sees channels that are not those of the sum."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        _, y = self.parts(x, residual)
        return self.last(y.reshape(-1, 8, 2, 3))


class WiderKernel(Block):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)


class Strided(Block):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(8, 8, 1, stride=2).requires_grad_(False)


class Grouped(Block):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(8, 8, 1, groups=2).requires_grad_(False)


@pytest.mark.parametrize(
    "block",
    [SumUsedAgain, ResultUsedAgain, ScaledBetween, ChannelsMixed, WiderKernel, Strided, Grouped],
)
def test_it_does_not_fire(block: type[Block]) -> None:
    gm, _ = capture(block(), torch.randn(4, 6, 8), torch.randn(4, 6, 8))
    before, after, record = fused(gm)
    assert record.outcome == "no match"
    assert networks.ops(after) == networks.ops(before)

"""fuse_qkv: complete on the real UNets, right, and only where an attention gains."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from captures import capture, captured_unet
from networks import stable_diffusion_unet
from torch import Tensor, nn
from torch.fx import GraphModule

from lsync_compile.graph.copying import copy_graph
from lsync_compile.options import Options
from lsync_compile.passes.choose_sdpa import ChooseSdpa
from lsync_compile.passes.fuse_qkv import FuseQkv
from lsync_compile.passes.fuse_temporal_attention import FuseTemporalAttention
from lsync_compile.passes.manager import PassManager
from lsync_compile.passes.remove_noops import RemoveNoops
from lsync_compile.report import PassRecord

SDPA = F.scaled_dot_product_attention


def rewritten(
    gm: GraphModule, kernels: str = "on", others: tuple = (FuseTemporalAttention,)
) -> tuple[GraphModule, PassRecord]:
    options = Options(kernels=kernels, fuse_temporal_attention=FuseTemporalAttention in others)
    copy = copy_graph(gm)
    passes = [RemoveNoops, FuseTemporalAttention, *others[1:], FuseQkv]
    records = PassManager(options, passes).run(copy, "unet", "graph")
    copy.graph.lint()
    (record,) = (record for record in records if record.name == "fuse_qkv")
    return copy, record


def count(gm: GraphModule, target: object) -> int:
    return [node.target for node in gm.graph.nodes].count(target)


@pytest.mark.parametrize(
    "others", [(None,), (FuseTemporalAttention,), (FuseTemporalAttention, ChooseSdpa)]
)
def test_the_real_unet(others: tuple) -> None:
    _, gm, inputs = captured_unet()
    with torch.no_grad():
        after, record = rewritten(gm, others=others)
        assert record.matches == 16 + 16 + 40  # within frames, keys and values of sound, frames
        # Three became one in 56 self-attentions, two in 16.
        assert count(gm, F.linear) - count(after, F.linear) == 2 * 56 + 16
        assert count(after, torch.cat) - count(gm, torch.cat) == 72
        expected = gm(*inputs)[0]
        torch.testing.assert_close(after(*inputs)[0], expected, rtol=1e-4, atol=1e-4)
        assert rewritten(after, others=others)[1].matches == 0


def test_stable_diffusion() -> None:
    gm, inputs = stable_diffusion_unet()
    with torch.no_grad():
        after, record = rewritten(gm)
        assert record.matches == 32  # 16 within the picture, 16 to the text
        torch.testing.assert_close(after(*inputs)[0], gm(*inputs)[0], rtol=1e-4, atol=1e-4)


class Projections(nn.Module):
    """Attention of two heads with projections as wanted."""

    def __init__(self, bias: tuple[bool, bool, bool] = (False,) * 3, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList([nn.Linear(8, width, bias=each) for each in bias])
        self.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        q, k, v = self.project(x, x if y is None else y)
        return SDPA(*(p.unflatten(2, (2, -1)).transpose(1, 2) for p in (q, k, v)))

    def project(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return tuple(p(z) for p, z in zip(self.parts, (x, y, y), strict=True))


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed))


def check(function: Callable, *args: Tensor, joined: int, linears: int) -> GraphModule:
    gm, inputs = capture(function, *args)
    after, record = rewritten(gm)
    assert (record.matches, count(after, F.linear)) == (joined, linears)
    torch.testing.assert_close(after(*inputs)[0], function(*args))
    return after


def test_self_attention() -> None:
    after = check(Projections(), tokens(), joined=1, linears=1)
    q, k, v = next(node for node in after.graph.nodes if node.target is SDPA).args
    storages = {x.meta["example_value"].untyped_storage()._cdata for x in (q, k, v)}
    assert len(storages) == 1  # read in place, nothing is copied


def test_cross_attention() -> None:
    check(Projections(), tokens(), tokens(2), joined=1, linears=2)


def test_biases_are_joined_where_all_have_them() -> None:
    check(Projections((True, True, True)), tokens(), joined=1, linears=1)
    check(Projections((True, False, True)), tokens(), joined=1, linears=2)
    check(Projections((True, False, False)), tokens(), joined=1, linears=2)


def test_values_used_elsewhere_too() -> None:
    module = Projections()

    def function(x: Tensor) -> Tensor:
        q, k, v = module.project(x, x)
        heads = [p.view(2, 5, 2, 4).transpose(1, 2) for p in (q, k, v)]
        return SDPA(*heads).transpose(1, 2).reshape(2, 5, 8) + k.view(-1).view(2, 5, 8)

    check(function, tokens(), joined=1, linears=1)


class Plain(nn.Module):
    """Linears of one input with no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * self.second(x)


class Computed(Projections):
    """Weights that are no inputs of the graph: adapted ones, for example."""

    def project(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.linear(x, p.weight + 0.1 * x.mean()) for p in self.parts)


class Different(Projections):
    def project(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return tuple(p(x * factor) for factor, p in enumerate(self.parts))


@pytest.mark.parametrize("make", [Plain, Computed, Different])
def test_it_does_not_fire(make: Callable) -> None:
    module = make()
    gm, inputs = capture(module, tokens())
    after, record = rewritten(gm)
    assert (record.outcome, record.matches) == ("no match", 0)
    assert torch.equal(after(*inputs)[0], module(tokens()))


def test_one_projection_used_three_times_stays() -> None:
    module = Projections()

    def function(x: Tensor) -> Tensor:
        q = module.parts[0](x).unflatten(2, (2, -1)).transpose(1, 2)
        return SDPA(q, q, q)

    check(function, tokens(), joined=0, linears=1)


def test_vetoes() -> None:
    gm, _ = capture(Projections(), tokens())
    assert rewritten(gm, kernels="auto")[1].reason == "no kernel runs on a CPU"
    assert rewritten(gm, kernels="off")[1].reason == "option kernels is 'off'"
    gm, _ = capture(Projections().requires_grad_(True), tokens())
    assert "gradient" in rewritten(gm)[1].reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    module, x = Projections().to(dtype), tokens().to(dtype)
    gm, inputs = capture(module, x)
    after, record = rewritten(gm)
    assert record.matches == 1
    torch.testing.assert_close(after(*inputs)[0], module(x))

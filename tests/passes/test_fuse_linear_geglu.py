"""fuse_linear_geglu: every feed-forward of real networks, before and after fuse_geglu."""

from __future__ import annotations

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
from lsync_compile.passes.fuse_geglu import FuseGeglu
from lsync_compile.passes.fuse_linear_geglu import OP, FuseLinearGeglu
from lsync_compile.passes.manager import PassManager


def fused(gm: GraphModule, **options: object):
    return networks.run_pass(gm, FuseLinearGeglu, **{"fuse_linear_geglu": True, **options})


@pytest.mark.parametrize(
    ("network", "count"),
    [
        (networks.latentsync_unet, 36),  # 16 transformers, 20 motion modules
        (networks.stable_diffusion_unet, 16),
    ],
)
def test_real_networks(network: Callable, count: int) -> None:
    gm, inputs = network()
    after, record = fused(gm)
    assert (record.outcome, record.matches) == ("applied", count)
    gone = networks.ops(gm) - networks.ops(after)
    parts = {"chunk": count, "getitem": 2 * count, "gelu": count, "mul": count}
    assert gone == {"linear": count, **parts}
    assert networks.ops(after) - networks.ops(gm) == {"linear_geglu.default": count}
    (one,), (other,) = networks.results(after, inputs), networks.results(gm, inputs)
    assert networks.distance(one, other) < 1e-5
    assert fused(after)[1].outcome == "no match"


def test_after_the_gates_are_fused() -> None:
    gm, inputs = networks.stable_diffusion_unet()
    copy = copy_graph(gm)
    specs = {cls: replace(cls.spec, after=()) for cls in (FuseGeglu, FuseLinearGeglu)}
    specs[FuseLinearGeglu] = replace(specs[FuseLinearGeglu], after=("fuse_geglu",))
    passes = [type(cls.__name__, (cls,), {"spec": spec}) for cls, spec in specs.items()]
    on = Options(kernels="on", fuse_linear_geglu=True)
    with torch.no_grad():
        records = PassManager(on, passes).run(copy, "unet", "graph")
    assert [record.matches for record in records] == [16, 16]
    assert "geglu.default" not in networks.ops(copy)
    (one,), (other,) = networks.results(copy, inputs), networks.results(gm, inputs)
    assert networks.distance(one, other) < 1e-5


class FeedForward(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 24, bias=bias).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x.sin()).chunk(2, dim=-1)
        return (value * F.gelu(gate)).cos()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_biases_and_precisions(bias: bool, dtype: torch.dtype) -> None:
    module = FeedForward(bias).to(dtype)
    gm, inputs = capture(module, torch.randn(4, 5, 8, dtype=dtype))
    after, record = fused(gm)
    assert record.matches == 1
    targets = [node.target for node in after.graph.nodes if node.op.startswith("call")]
    assert targets == ["sin", OP, "cos"]
    results = [each(*inputs)[0] for each in (after, gm)]
    x = next(value for value in inputs if value.dim() == 3).double()
    new, old = (networks.distance(result, module.double()(x)) for result in results)
    assert new <= old


def hidden_used_again(x: Tensor, w: Tensor) -> Tensor:
    hidden = F.linear(x, w)
    value, gate = hidden.chunk(2, dim=-1)
    return value * F.gelu(gate) + hidden.sum()


def no_projection(x: Tensor, w: Tensor) -> Tensor:
    value, gate = (x @ w.t()).chunk(2, dim=-1)
    return value * F.gelu(gate)


def activated_before(x: Tensor, w: Tensor) -> Tensor:
    value, gate = F.linear(x, w).sin().chunk(2, dim=-1)
    return value * F.gelu(gate)


def double(x: Tensor, w: Tensor) -> Tensor:
    value, gate = F.linear(x.double(), w.double()).chunk(2, dim=-1)
    return value * F.gelu(gate)


@pytest.mark.parametrize("function", [hidden_used_again, no_projection, activated_before, double])
def test_it_does_not_fire(function: Callable) -> None:
    gm, _ = capture(function, torch.randn(4, 8), torch.randn(6, 8))
    after, record = fused(gm)
    assert record.outcome == "no match"
    assert networks.ops(after) == networks.ops(gm)


def alone() -> type:
    spec = replace(FuseLinearGeglu.spec, after=())
    return type("Alone", (FuseLinearGeglu,), {"spec": spec})

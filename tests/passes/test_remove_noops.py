"""remove_noops: exact, complete on the real UNet, and away from what only looks idle."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from captures import capture, captured_unet
from torch import Tensor
from torch.fx import GraphModule

from lsync_compile.graph.census import op_name
from lsync_compile.graph.copying import copy_graph
from lsync_compile.options import Options
from lsync_compile.passes.manager import PassManager
from lsync_compile.passes.remove_noops import RemoveNoops


def rewritten(gm: GraphModule) -> tuple[GraphModule, int]:
    copy = copy_graph(gm)
    (record,) = PassManager(Options(), [RemoveNoops]).run(copy, "unet", "graph")
    return copy, record.matches


def ops(gm: GraphModule) -> Counter[str]:
    return Counter(op_name(node) for node in gm.graph.nodes if node.op.startswith("call"))


def test_the_real_unet() -> None:
    _, gm, inputs = captured_unet()
    after, matches = rewritten(gm)
    with torch.no_grad():
        assert torch.equal(after(*inputs)[0], gm(*inputs)[0])
    assert matches == 58
    # 36 dropouts, 2 casts, the product with 1 in the time embedding, 19 pairs of transposes of
    # which the first goes too where nothing else uses it
    gone = ops(gm) - ops(after)
    assert gone == {"dropout": 36, "to": 2, "mul": 1, "transpose": 22}
    assert not ops(after) - ops(gm)
    assert rewritten(after)[1] == 0


def noop_dropout(x: Tensor) -> Tensor:
    return F.dropout(x.sin(), 0.5, training=False).cos()


def noop_casts(x: Tensor) -> Tensor:
    return x.sin().to(torch.float32).float().contiguous().to(x.device).cos()


def noop_views(x: Tensor) -> Tensor:
    return x.sin().view(2, 3).reshape(2, 3).expand(2, 3).flatten(1).cos()


def noop_transposes(x: Tensor) -> Tensor:
    return x.sin().transpose(0, 1).transpose(-1, 0).cos()


def noop_arithmetic(x: Tensor) -> Tensor:
    return ((1 * x.sin()) * 1.0 / 1).cos()


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (noop_dropout, 1),
        (noop_casts, 4),
        (noop_views, 4),
        (noop_transposes, 1),
        (noop_arithmetic, 3),
    ],
)
def test_each_case(function, count: int) -> None:
    x = torch.randn(2, 3)
    gm, inputs = capture(function, x)
    after, matches = rewritten(gm)
    assert matches == count
    assert ops(after) == {"sin": 1, "cos": 1}
    assert torch.equal(after(*inputs)[0], function(x))


def busy_dropout(x: Tensor) -> Tensor:
    return F.dropout(x.sin(), 0.5, training=True).cos()


def busy_casts(x: Tensor) -> Tensor:
    return x.sin().to(torch.float64).t().contiguous().cos()


def copying_cast(x: Tensor) -> Tensor:
    return x.sin().to(torch.float32, copy=True).cos()


def busy_views(x: Tensor) -> Tensor:
    return x.sin().view(3, 2).transpose(0, 1).cos()


def other_transposes(x: Tensor) -> Tensor:
    return x.sin().view(1, 2, 3).transpose(0, 1).transpose(1, 2).cos()


def busy_arithmetic(x: Tensor) -> Tensor:
    return ((x.sin() * 2) + 0 - 0.0).cos()


def promoting_arithmetic(x: Tensor) -> Tensor:
    return (x.long() / 1).cos()


def view_as_result(x: Tensor) -> Tensor:
    return x.view(2, 3)


def copy_as_result(x: Tensor) -> Tensor:
    return (x * 1).view(6)


def copy_in_a_graph_that_writes(x: Tensor) -> Tensor:
    y = x.sin()
    z = y * 1
    y.add_(1)
    return z.cos() + y


@pytest.mark.parametrize(
    "function",
    [
        busy_dropout,
        busy_casts,
        copying_cast,
        busy_views,
        other_transposes,
        busy_arithmetic,
        promoting_arithmetic,
        view_as_result,
        copy_as_result,
        copy_in_a_graph_that_writes,
    ],
)
def test_it_does_not_fire(function) -> None:
    gm, _ = capture(function, torch.randn(2, 3))
    after, matches = rewritten(gm)
    assert matches == 0
    assert ops(after) == ops(gm)


def test_gradients_are_the_same_bits() -> None:
    def function(x: Tensor) -> Tensor:
        return noop_transposes(F.dropout(x * 1, 0.1, training=False)).sum()

    one = torch.randn(2, 3, requires_grad=True)
    two = one.detach().clone().requires_grad_()
    gm, _ = capture(function, one)
    after, matches = rewritten(gm)
    assert matches == 3
    after(one)[0].backward()
    function(two).backward()
    assert torch.equal(one.grad, two.grad)

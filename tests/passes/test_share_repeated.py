"""share_repeated: exact, complete on the real UNet, and away from what must stay apart."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from captures import capture, captured_unet
from torch import Tensor
from torch.fx import GraphModule

from lsync_compile.graph.copying import copy_graph
from lsync_compile.options import Options
from lsync_compile.passes.manager import PassManager
from lsync_compile.passes.share_repeated import ShareRepeated
from lsync_compile.report import PassRecord

# Comes after remove_noops, which these graphs do not need.
Alone = type("Alone", (ShareRepeated,), {})
Alone.spec = type(ShareRepeated.spec)(
    **{**vars(ShareRepeated.spec), "after": ()},
)


def rewritten(gm: GraphModule) -> tuple[GraphModule, PassRecord]:
    copy = copy_graph(gm)
    (record,) = PassManager(Options(), [Alone]).run(copy, "unet", "graph")
    return copy, record


def calls(gm: GraphModule) -> list[object]:
    return [node.target for node in gm.graph.nodes if node.op.startswith("call")]


def test_the_real_unet() -> None:
    _, gm, inputs = captured_unet()
    with torch.no_grad():
        after, record = rewritten(gm)
        assert torch.equal(after(*inputs)[0], gm(*inputs)[0])
    assert record.matches == 21  # SiLU of the time embedding: 22 resnets, computed once
    assert calls(gm).count(F.silu) - calls(after).count(F.silu) == 21
    assert len(calls(gm)) - len(calls(after)) == 21
    with torch.no_grad():
        assert rewritten(after)[1].matches == 0


def test_what_depends_on_shared_values_is_shared_too() -> None:
    def function(x: Tensor) -> Tensor:
        return (F.silu(x) * 2).cos() + (F.silu(x) * 2).sin()

    gm, inputs = capture(function, torch.randn(3))
    after, record = rewritten(gm)
    assert record.matches == 2
    assert torch.equal(after(*inputs)[0], function(*inputs))


def with_random_numbers(x: Tensor) -> Tensor:
    return torch.rand_like(x) - torch.rand_like(x) + F.dropout(x) - F.dropout(x)


def with_other_arguments(x: Tensor) -> Tensor:
    row = x[0]
    return (x.view(2, 3) + x.view(3, 2).t()) * (torch.add(row, 1) + torch.add(row, 1.0)).sum()


def with_results_of_their_own(x: Tensor) -> tuple[Tensor, Tensor]:
    return F.silu(x).view(-1), F.silu(x).view(-1)


@pytest.mark.parametrize(
    "function", [with_random_numbers, with_other_arguments, with_results_of_their_own]
)
def test_it_does_not_fire(function) -> None:
    gm, _ = capture(function, torch.randn(6).view(2, 3))
    after, record = rewritten(gm)
    assert (record.outcome, record.matches) == ("no match", 0)
    assert calls(after) == calls(gm)


def test_results_stay_tensors_of_their_own() -> None:
    gm, inputs = capture(with_results_of_their_own, torch.randn(2, 3))
    after, _ = rewritten(gm)
    first, second = after(*inputs)
    first.zero_()
    assert second.abs().sum() > 0


def test_a_graph_that_writes_is_vetoed() -> None:
    def function(x: Tensor) -> Tensor:
        first = F.silu(x)
        first.add_(1)
        return first + F.silu(x)

    gm, inputs = capture(function, torch.randn(3))
    after, record = rewritten(gm)
    assert record.outcome == "vetoed"
    assert record.reason == "add_ writes in place"
    assert torch.equal(after(*inputs)[0], function(*inputs))


def test_a_graph_that_wants_gradients_is_vetoed() -> None:
    gm, _ = capture(lambda x: F.silu(x) + F.silu(x).cos(), torch.randn(3, requires_grad=True))
    _, record = rewritten(gm)
    assert record.reason == "gradients would be summed in another order"
    with torch.no_grad():
        assert rewritten(gm)[1].matches == 1

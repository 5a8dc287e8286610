"""Results get their strides back after passes that work in another layout."""

from __future__ import annotations

import pytest
import torch
from captures import capture
from torch import Tensor

from lsync_compile.graph.build import call, replace
from lsync_compile.graph.results import restore_strides, result_strides


def turned(gm) -> None:
    """Put a copy with other strides after each sine."""
    for node in [node for node in gm.graph.nodes if node.target == "sin"]:
        with gm.graph.inserting_after(node):
            copy = call(gm.graph, "contiguous", node, memory_format=torch.channels_last)
            replace(node, copy)


def one(x: Tensor) -> Tensor:
    return x.sin()


def a_view(x: Tensor) -> Tensor:
    return x.sin().transpose(1, 2)


def several(x: Tensor) -> tuple:
    y = x.sin()
    return y, 3, [x.cos(), y], y.amax()


@pytest.mark.parametrize(("function", "copies"), [(one, 1), (a_view, 1), (several, 1)])
def test_strides_come_back(function, copies: int) -> None:
    gm, inputs = capture(function, torch.randn(2, 3, 4, 5))
    before, expected = result_strides(gm.graph), gm(*inputs)
    turned(gm)
    assert result_strides(gm.graph) != before
    assert restore_strides(gm.graph, before) == copies
    assert result_strides(gm.graph) == before
    gm.graph.lint()
    gm.recompile()
    for value, wanted in zip(gm(*inputs), expected, strict=True):
        assert torch.equal(value, wanted)
        assert value.stride() == wanted.stride()


def test_nothing_is_done_where_nothing_changed() -> None:
    gm, _ = capture(several, torch.randn(2, 3, 4, 5))
    count = len(gm.graph.nodes)
    assert restore_strides(gm.graph, result_strides(gm.graph)) == 0
    assert len(gm.graph.nodes) == count

"""Digits follow views as the numbers themselves do, and arrange() is their inverse."""

from __future__ import annotations

import pytest
import torch
from captures import capture
from torch import Tensor
from torch.fx import GraphModule

from lsync_compile.graph.axes import (
    Axes,
    Digit,
    after_view,
    arrange,
    merged,
    permuted,
    regrouped,
    sizes,
    viewed,
    whole,
)


def to_positions(x: Tensor) -> Tensor:
    return x.view(2, 4, 6, 3, 5).permute(0, 3, 4, 1, 2).flatten(0, 2)


def and_back(x: Tensor) -> Tensor:
    x = to_positions(x).unflatten(0, (2, 3, 5))
    return torch.permute(x, [0, 3, 4, 1, 2]).reshape(8, 6, 3, 5)


def to_heads(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, -1).reshape(8, 15, 2, 3).transpose(1, 2)


def with_ones(x: Tensor) -> Tensor:
    return x.unsqueeze(1).transpose(1, 3).squeeze(3).contiguous()


def axes_of_result(gm: GraphModule, start: Axes) -> Axes | None:
    """Follow the one chain of a captured graph."""
    axes: Axes | None = start
    for node in gm.graph.nodes:
        if node.op.startswith("call") and axes is not None:
            assert viewed(node) is node.args[0]
            axes = after_view(node, axes)
    return axes


@pytest.mark.parametrize("function", [to_positions, and_back, to_heads, with_ones])
def test_arranging_by_the_digits_gives_the_numbers_of_the_views(function) -> None:
    x = torch.arange(8 * 6 * 3 * 5).view(8, 6, 3, 5)
    gm, _ = capture(function, x)
    axes = axes_of_result(gm, whole(x.shape))
    assert axes is not None
    assert sizes(axes) == function(x).shape
    (start,) = (node for node in gm.graph.nodes if node.op == "placeholder")
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        new = arrange(gm.graph, start, whole(x.shape), axes, like=start)
        back = arrange(gm.graph, new, axes, whole(x.shape), like=start)
    output.args = ((new, back),)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    arranged, restored = gm(x)
    assert torch.equal(arranged, function(x))
    assert torch.equal(restored, x)


def test_equal_arrangements_are_equal_however_they_were_written() -> None:
    x = torch.zeros(8, 6, 3, 5)
    gm, _ = capture(and_back, x)
    assert axes_of_result(gm, whole(x.shape)) == whole(x.shape)
    gm, _ = capture(lambda x: x.flatten(2).mT.unflatten(1, (3, 5)).permute(0, 3, 1, 2), x)
    # An attribute in the graphs of torch 2.13, a call of aten.mT in those of 2.14.
    turned = [node for node in gm.graph.nodes if "mT" in f"{node.target} {node.args}"]
    assert [viewed(node) for node in turned] == [None]


def test_nothing_is_inserted_where_nothing_changes() -> None:
    gm, _ = capture(to_positions, torch.zeros(8, 6, 3, 5))
    (start,) = (node for node in gm.graph.nodes if node.op == "placeholder")
    axes = whole((8, 6, 3, 5))
    assert arrange(gm.graph, start, axes, axes, like=start) is start


def test_digits_split_and_merge() -> None:
    (six,) = whole((6,))
    assert regrouped((six,), (2, 3)) == ((Digit(0, 3, 6),), (Digit(0, 1, 3),))
    assert merged([Digit(0, 3, 6), Digit(0, 1, 3)]) == six
    assert merged([Digit(0, 1, 3), Digit(0, 3, 6)]) == (Digit(0, 1, 3), Digit(0, 3, 6))
    turned = permuted(whole((2, 3)), (1, 0))
    assert regrouped(turned, (2, 3)) is None  # no digit of either index
    assert regrouped(turned, (6,)) == ((Digit(1, 1, 3), Digit(0, 1, 2)),)
    assert regrouped(whole((6,)), (4,)) is None
    assert regrouped(whole((6,)), (6, 2)) is None


def test_other_numbers_are_refused() -> None:
    gm, _ = capture(to_positions, torch.zeros(8, 6, 3, 5))
    (start,) = (node for node in gm.graph.nodes if node.op == "placeholder")
    with pytest.raises(ValueError, match="is no arrangement of"):
        arrange(gm.graph, start, whole((2, 3)), whole((2, 3, 4)), like=start)
    with pytest.raises(ValueError, match="cannot be cut"):
        arrange(gm.graph, start, whole((2, 3)), whole((3, 2)), like=start)


def test_what_computes_or_reads_bits_is_no_view() -> None:
    def function(x: Tensor) -> Tensor:
        return x.view(torch.int32).flip(0) + x[:, :1].view(2, 1).to(torch.int32).expand(2, 3)

    gm, _ = capture(function, torch.ones(2, 3))
    names = [node.target for node in gm.graph.nodes if viewed(node) is not None]
    assert names == ["view"]  # the one that changes the shape only

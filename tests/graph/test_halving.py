"""Half of the batch: known operations give the slice of the whole result, others are declined."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from captures import capture
from torch import Tensor
from torch.fx import Node

from lsync_compile.graph.halving import half_of, halved, is_half


def halve_the_last(function: Callable[..., Tensor], *tensors: Tensor, second: bool) -> bool:
    """Halve the operations of a function of (batch, …) tensors; whether the last one could be.

    Where it could, the result is checked. Tensors of another first size than 4 are weights.
    """
    gm, inputs = capture(function, *tensors)
    halves: dict[Node, Node | None] = {}
    output = gm.graph.output_node()
    (last,) = output.all_input_nodes
    expected = gm(*inputs)[0]

    def half(node: Node) -> Node | None:
        if node not in halves:
            whole_batch = node.op == "placeholder" and node.meta["example_value"].shape[:1] == (4,)
            halves[node] = half_of(node, second) if whole_batch else halved(node, half)
        return halves[node]

    with gm.graph.inserting_before(output):
        found = half(last)
    gm.graph.lint()
    if found is None:
        gm.recompile()
        assert torch.equal(gm(*inputs)[0], expected)
        return False
    output.args = ((found,),)
    gm.recompile()
    middle = len(expected) // 2
    wanted = expected[middle:] if second else expected[:middle]
    assert torch.equal(gm(*inputs)[0], wanted)
    assert found.meta["example_value"].shape == wanted.shape
    return True


X = torch.randn(4, 6, 8, 8)
KNOWN: list[tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]] = [
    ("add", lambda x, y: x + y * 2, (X, X)),
    ("broadcast over the batch", lambda x, y: x + y, (X, X[:1])),
    ("of lower rank", lambda x, y: x * y, (X, X[0, 0])),
    ("what the whole batch gives", lambda x: x - x.mean(0), (X,)),
    ("number first", lambda x: 1 + x, (X,)),
    ("linear", F.linear, (X, torch.randn(5, 8))),
    ("conv", F.conv2d, (X, torch.randn(5, 6, 3, 3))),
    ("group norm", lambda x: F.group_norm(x, 2), (X,)),
    ("layer norm", lambda x: F.layer_norm(x, (8, 8)), (X,)),
    ("attention", lambda x: F.scaled_dot_product_attention(x, x, x), (X,)),
    ("join of channels", lambda x: torch.cat([x, x.sin()], dim=1), (X,)),
    ("chunk", lambda x: x.chunk(2, dim=1)[1], (X,)),
    ("frames", lambda x: x.view(2, 2, 6, 8, 8).transpose(1, 2).flatten(3), (X,)),
    ("sizes said", lambda x: x.reshape(8, 3, 8, 8).permute(0, 2, 3, 1), (X,)),
    ("lists", lambda x: x.reshape([8, 3, 8, 8]).permute([0, 2, 3, 1]), (X,)),
    ("size left out", lambda x: x.view(-1, 2, 3, 8, 8), (X,)),
    ("unflatten", lambda x: x.unflatten(0, (2, 2)), (X,)),
    ("flatten", lambda x: x.flatten(0, 1).contiguous(), (X,)),
    ("index", lambda x: x[:, 1:4, None], (X,)),
    ("expand", lambda x: x[:, :1].expand(4, 6, 8, 8), (X,)),
    ("spread", lambda x, y: x + y.expand(4, 6, 8, 8), (X, X[:1])),
    ("repeat", lambda x: x.repeat_interleave(3, dim=0), (X,)),
    ("resize", lambda x: F.interpolate(x, scale_factor=2.0), (X,)),
    ("dropout at rest", lambda x: F.dropout(x, 0.5, training=False), (X,)),
    ("cast", lambda x: x.double().sin().to(torch.float32), (X,)),
]


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("case", KNOWN, ids=[name for name, *_ in KNOWN])
def test_known_operations(case: tuple, second: bool) -> None:
    _, function, tensors = case
    assert halve_the_last(function, *tensors, second=second)


UNKNOWN: list[tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]] = [
    ("transposed batch", lambda x: x.transpose(0, 1).sin(), (X,)),
    ("permuted batch", lambda x: x.permute(1, 0, 2, 3).sin(), (X,)),
    ("permuted batch, a list", lambda x: x.permute([1, 0, 2, 3]).sin(), (X,)),
    ("join of batches", lambda x: torch.cat([x, x]), (X,)),
    ("join of batches, from behind", lambda x: torch.cat([x, x], dim=-4), (X,)),
    ("slice of the batch", lambda x: x[1:3].sin(), (X,)),
    ("index list", lambda x: x[[3, 0, 1, 2]].sin(), (X,)),
    ("no batch", lambda x: F.conv2d(x[0, None], torch.ones(2, 6, 3, 3)).transpose(0, 1), (X,)),
    ("odd", lambda x: x.reshape(3, -1).sin(), (X,)),
    ("flat conv", F.conv2d, (X[:, 0], torch.randn(2, 4, 3, 3))),
    ("flat norm", lambda x: F.layer_norm(x, (4, 6, 8, 8)), (X,)),
    ("flat linear", lambda x, w: F.linear(x, w).sin(), (X[:, 0, 0, 0], torch.ones(4, 4))),
    ("mask", lambda x, m: F.scaled_dot_product_attention(x, x, x, m), (X, X[:1, :1])),
    ("dropout", lambda x: F.dropout(x, 0.5, training=True), (X,)),
    ("flipped", lambda x: x.flip(0), (X,)),
    ("repeated whole", lambda x: x.repeat(2, 1, 1, 1), (X,)),
]


@pytest.mark.parametrize("case", UNKNOWN, ids=[name for name, *_ in UNKNOWN])
def test_unknown_operations_are_declined(case: tuple) -> None:
    name, function, tensors = case
    gm, _ = capture(function, *tensors)
    halves: dict[Node, Node | None] = {}

    def half(node: Node) -> Node | None:
        if node not in halves:
            batch = node.op == "placeholder" and node.meta["example_value"].shape[:1] == (4,)
            halves[node] = half_of(node, False) if batch else halved(node, half)
        return halves[node]

    (last,) = gm.graph.output_node().all_input_nodes
    with gm.graph.inserting_before(gm.graph.output_node()):
        assert half(last) is None, name
    gm.graph.lint()


def test_slices_of_one_half_are_recognised() -> None:
    def function(x: Tensor) -> list[Tensor]:
        return [x[:2], x[2:], x[0:2], x[1:3], x[:, :2], x[::2], x[-2:], x[2:4]]

    gm, _ = capture(function, X)
    source = next(iter(gm.graph.nodes))
    slices = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert [is_half(node, source) for node in slices] == [
        *(True, True, True, False, False, False, True, True)
    ]
    assert [is_half(node, source, second=True) for node in slices[:3]] == [False, True, False]
    assert not is_half(source, source)

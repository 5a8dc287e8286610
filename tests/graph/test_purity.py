"""Writes in place are found however they are written; results' memory is known."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from captures import capture, captured_unet
from torch.fx import Graph

from lsync_compile.graph.purity import has_writes, result_storages, storage, writes_in_place


def graph_of(op: str, target: object, *args: object, **kwargs: object):
    graph = Graph()
    x = graph.placeholder("x")
    return graph.create_node(op, target, (x, *args), kwargs)


@pytest.mark.parametrize(
    ("op", "target", "args", "kwargs"),
    [
        ("call_method", "add_", (1,), {}),
        ("call_method", "__setitem__", (0, 1), {}),
        ("call_function", operator.iadd, (1,), {}),
        ("call_function", operator.setitem, (0, 1), {}),
        ("call_function", torch.relu_, (), {}),
        ("call_function", torch.add, (1,), {"out": None}),
        ("call_function", F.silu, (), {"inplace": True}),
        ("call_function", F.silu, (True,), {}),
        ("call_function", F.dropout, (0.5, True, True), {}),
        ("call_function", torch.ops.aten.add_.Tensor, (1,), {}),
    ],
)
def test_writes(op: str, target: object, args: tuple, kwargs: dict) -> None:
    assert writes_in_place(graph_of(op, target, *args, **kwargs))


@pytest.mark.parametrize(
    ("op", "target", "args", "kwargs"),
    [
        ("call_method", "add", (1,), {}),
        ("call_method", "__getitem__", (0,), {}),
        ("call_function", operator.add, (1,), {}),
        ("call_function", operator.inv, (), {}),
        ("call_function", F.silu, (), {"inplace": False}),
        ("call_function", F.dropout, (0.0, False, False), {}),
        ("call_function", torch.ops.aten.add.Tensor, (1,), {}),
        ("call_function", F.linear, (1,), {}),
    ],
)
def test_does_not_write(op: str, target: object, args: tuple, kwargs: dict) -> None:
    assert not writes_in_place(graph_of(op, target, *args, **kwargs))


def test_the_real_unet_writes_nothing() -> None:
    _, gm, _ = captured_unet()
    assert not has_writes(gm.graph)


def test_views_of_a_result_share_its_memory() -> None:
    def function(x):
        inside = x * 2
        seen = x + 1
        return inside.sum(), seen.view(-1).transpose(0, 0)

    gm, _ = capture(function, torch.ones(2, 2))
    nodes = {node.target: node for node in gm.graph.nodes}
    results = result_storages(gm.graph)
    assert storage(nodes[operator.add]) in results
    assert storage(nodes[operator.mul]) not in results

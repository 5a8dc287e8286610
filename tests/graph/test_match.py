"""Questions to nodes: arguments however given, operands that fit, users."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from captures import capture
from torch import Tensor

from lsync_compile.graph.match import ADD, argument, calls, is_silu, operands, sole_user


def nodes_of(function, *inputs):
    gm, _ = capture(function, *inputs)
    return {node.name: node for node in gm.graph.nodes}


def test_arguments_by_position_and_by_name() -> None:
    nodes = nodes_of(lambda x: (F.gelu(x), F.layer_norm(x, (3,), eps=1e-3)), torch.ones(2, 3))
    gelu, norm = nodes["gelu"], nodes["layer_norm"]
    assert calls(gelu, F.gelu)
    assert not calls(gelu, F.silu, "gelu")
    assert not calls(None, F.gelu)
    assert argument(norm, 1, "normalized_shape") == (3,)
    assert argument(norm, 4, "eps", 1e-5) == 1e-3
    assert argument(norm, 2, "weight") is None


def test_operands_have_the_results_shape_and_dtype() -> None:
    def function(x: Tensor, row: Tensor) -> tuple[Tensor, ...]:
        return x + x.sin(), x + row, x + 1, torch.add(x, x, alpha=2), x + x.double()

    results = nodes_of(function, torch.ones(2, 3), torch.ones(3))["output"].args[0]
    found = [operands(node, ADD) for node in results]
    assert [part is not None for part in found] == [True, False, False, False, False]
    assert found[0][1].target == "sin"
    assert operands(results[0], (operator.mul,)) is None


def test_users() -> None:
    nodes = nodes_of(lambda x: F.silu(x.sin()) + F.silu(x.cos(), inplace=True), torch.ones(3))
    assert sole_user(nodes["sin"]) is nodes["silu"]
    assert sole_user(next(iter(nodes.values()))) is None
    assert is_silu(nodes["silu"])
    assert not is_silu(nodes["silu_1"])
    assert not is_silu(nodes["sin"])

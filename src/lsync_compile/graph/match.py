"""Small questions that passes ask of nodes: which call, with which arguments, used by whom."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from lsync_compile.graph.build import example

ADD = (operator.add, torch.add)
MULTIPLY = (operator.mul, torch.mul, torch.multiply)


def calls(node: Any, *targets: Any) -> bool:
    """Whether a node calls one of these functions, or methods by name."""
    return isinstance(node, Node) and node.op.startswith("call_") and node.target in targets


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def operands(node: Any, targets: tuple[Any, ...]) -> tuple[Node, Node] | None:
    """Both operands where ``node`` applies one of ``targets`` to two tensors, and no more.

    Both have example values of the result's shape, dtype and device.
    """
    if not calls(node, *targets) or node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    kinds = [_kind(part) for part in (node, first, second)]
    return (first, second) if kinds[0] and kinds[0] == kinds[1] == kinds[2] else None


def sole_user(node: Node) -> Node | None:
    """The only user of a node; None where there are more, or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_silu(node: Any) -> bool:
    """Whether a node is SiLU to a tensor of its own."""
    return calls(node, F.silu) and not argument(node, 1, "inplace", False)


def _kind(node: Any) -> Any:
    value = example(node)
    return None if value is None else (value.shape, value.dtype, value.device)

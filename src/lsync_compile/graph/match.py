"""Small questions that passes ask of nodes: which call, with which arguments, used by whom."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from lsync_compile.graph.build import example

CONVOLUTION = (F.conv2d, torch.conv2d)
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


def share_dtype(*nodes: Any) -> bool:
    """Whether these are tensors of one dtype; None, an argument left out, does not count."""
    values = [example(node) for node in nodes if node is not None]
    dtypes = {None if value is None else value.dtype for value in values}
    return len(dtypes) == 1 and None not in dtypes


def convolves(node: Any, side: int) -> bool:
    """Whether a node convolves pictures at every pixel, side x side with a margin of zeros."""
    if not calls(node, *CONVOLUTION):
        return False
    weight, value = example(argument(node, 1, "weight")), example(node)
    if weight is None or value is None or value.dim() != 4 or weight.shape[2:] != (side, side):
        return False
    wanted = ((3, "stride", 1, 1), (4, "padding", 0, side // 2), (5, "dilation", 1, 1))
    for index, name, usual, size in wanted:
        given = argument(node, index, name, usual)
        if tuple(given if isinstance(given, (tuple, list)) else (given, given)) != (size, size):
            return False
    return bool(argument(node, 6, "groups", 1) == 1)


def sole_user(node: Node) -> Node | None:
    """The only user of a node; None where there are more, or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_silu(node: Any) -> bool:
    """Whether a node is SiLU to a tensor of its own."""
    return calls(node, F.silu) and not argument(node, 1, "inplace", False)


def _kind(node: Any) -> Any:
    value = example(node)
    return None if value is None else (value.shape, value.dtype, value.device)

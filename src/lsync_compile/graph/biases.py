"""Biases of convolutions and projections: finding them, taking them away, adding them up."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from lsync_compile.graph.build import call, example
from lsync_compile.graph.match import CONVOLUTION, argument, calls


def convolution_bias(node: Any) -> Node | None:
    """The bias of a convolution of pictures."""
    value = example(node) if calls(node, *CONVOLUTION) else None
    return bias_of(node) if value is not None and value.dim() == 4 else None


def bias_of(node: Node, index: int = 2, name: str = "bias") -> Node | None:
    """A bias that a call is given, by position or by name; None where it is given none.

    Convolutions and linear layers take theirs where the defaults say.
    """
    bias = argument(node, index, name)
    return bias if example(bias) is not None else None


def without_bias(node: Node, index: int = 2, name: str = "bias") -> Node:
    """Insert the same call without its bias."""
    args, kwargs = list(node.args), dict(node.kwargs)
    if len(args) > index:
        args[index] = None
    else:
        kwargs.pop(name)
    target: Any = node.target
    return call(node.graph, target, *args, like=node, **kwargs)


def sum_of_biases(one: Node | None, other: Node | None, like: Node) -> Node | None:
    """Insert the sum of two biases in float32."""
    if one is None or other is None:
        return one or other
    graph = like.graph
    wide = [call(graph, "float", each, like=like) for each in (one, other)]
    return call(graph, torch.add, *wide, like=like)

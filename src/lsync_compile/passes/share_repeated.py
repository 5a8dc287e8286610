"""Compute equal operations on equal inputs once.

The network asks for some things again in each layer. In LatentSync's UNet each resnet applies SiLU
to the same time embedding::

    s1 = silu(emb)                      s1 = silu(emb)
    t1 = linear(s1, w1)                 t1 = linear(s1, w1)
    s2 = silu(emb)                ->    t2 = linear(s1, w2)
    t2 = linear(s2, w2)

Only operations that give the same bits for the same bits are shared (no random numbers), and only
in graphs that write nothing in place. Memory that results of the graph lie in is not shared. Where
a gradient is wanted the pass stays away: the gradients of the copies would be summed in another
order, which rounds otherwise.

Exact under every lowering.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from lsync_compile.graph.purity import (
    has_writes,
    result_storages,
    storage,
    wants_gradient,
    writes_in_place,
)
from lsync_compile.passes.spec import Pass, PassContext, PassSpec, Phase, register

# Deterministic functions of their arguments; whatever is not named is left alone.
_FUNCTIONS = frozenset(
    {
        *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow),
        *(operator.getitem, getattr),
        *(torch.add, torch.sub, torch.mul, torch.div, torch.exp, torch.sin, torch.cos, torch.cat),
        *(torch.arange, torch.sigmoid, torch.tanh, torch.chunk, torch.stack),
        *(F.silu, F.gelu, F.relu, F.linear, F.conv2d, F.group_norm, F.layer_norm, F.interpolate),
        *(F.softmax, F.pad, F.avg_pool2d, F.mish),
    }
)
_METHODS = frozenset(
    {
        *("view", "reshape", "flatten", "unflatten", "transpose", "permute", "expand"),
        *("unsqueeze", "squeeze", "chunk", "split", "repeat", "repeat_interleave"),
        *("contiguous", "to", "float", "half", "bfloat16", "size", "dim"),
    }
)


@register
class ShareRepeated(Pass):
    """Common subexpressions; counts the operations dropped."""

    spec = PassSpec(
        name="share_repeated",
        phase=Phase.CLEAN,
        option="share_repeated",
        after=("remove_noops",),
        summary="Computes equal operations on equal inputs once, such as each resnet's SiLU of "
        "the time embedding.",
    )

    def veto(self, gm: GraphModule, context: PassContext) -> str:
        if has_writes(gm.graph):
            names = [node.name for node in gm.graph.nodes if writes_in_place(node)]
            return f"{names[0]} writes in place"
        if wants_gradient(gm.graph):
            return "gradients would be summed in another order"
        return ""

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        first: dict[Any, Node] = {}
        results = result_storages(gm.graph)
        shared = 0
        for node in gm.graph.nodes:
            key = _key(node)
            if key is None:
                continue
            earlier = first.setdefault(key, node)
            if earlier is not node and storage(node) not in results:
                node.replace_all_uses_with(earlier)
                gm.graph.erase_node(node)
                shared += 1
        return shared


def _key(node: Node) -> Any:
    """What decides the node's value; None where it must not be shared."""
    known = (node.op == "call_function" and node.target in _FUNCTIONS) or (
        node.op == "call_method" and node.target in _METHODS
    )
    if not known:
        return None
    # repr tells 1 from 1.0 and from True, which compare equal and compute differently.
    args, kwargs = map_arg((node.args, dict(sorted(node.kwargs.items()))), _name)
    return node.op, node.target, repr(args), repr(kwargs)


class _Name(str):
    """A node in a key: its name, unique in its graph, and unlike any string argument."""

    def __repr__(self) -> str:
        return f"%{self}"


def _name(node: Node) -> _Name:
    return _Name(node.name)

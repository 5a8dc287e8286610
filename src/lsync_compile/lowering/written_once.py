"""Have Inductor write a value once that several kernels outside of it read.

On a GPU Inductor computes sums and joined channels where they are used. What a convolution reads,
or an op of this package, must lie in memory, and each such reader is given a copy of its own: a
skip connection, joined to what comes from below, is written for the group norm and once more for
the shortcut's convolution of the same residual block. A stride that is asked for makes it one::

    x = cat([h, skip], 1)                x = force_stride_order(cat([h, skip], 1), strides)
    n = lsync.group_norm_silu(x, …)  ->  n = lsync.group_norm_silu(x, …)
    y = conv2d(view(x), w)               y = conv2d(view(x), w)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch._inductor import inductor_prims
from torch.fx import GraphModule, Node

from lsync_compile.graph.axes import viewed
from lsync_compile.graph.build import call, example
from lsync_compile.graph.copying import copy_graph
from lsync_compile.graph.match import ADD, CONVOLUTION, MULTIPLY, calls
from lsync_compile.graph.purity import why_seen

_FORCE: Any = getattr(inductor_prims, "force_stride_order", None)  # not part of torch's interface
_COMPUTED_WHERE_USED = (torch.cat, *ADD, *MULTIPLY)
_OUTSIDE = (*CONVOLUTION, F.linear, F.scaled_dot_product_attention)


def written_once(gm: GraphModule) -> GraphModule:
    """A copy that asks for the strides of such values; ``gm`` itself where there are none."""
    if _FORCE is None or not any(_is_shared(node) for node in gm.graph.nodes):
        return gm
    if why_seen(gm.graph):  # it has no gradient, and a write to what it copies would be missed
        return gm
    gm = copy_graph(gm)
    for node in [node for node in gm.graph.nodes if _is_shared(node)]:
        value = example(node)
        assert value is not None  # _is_shared() has looked at it
        with gm.graph.inserting_after(node):
            forced = call(gm.graph, _FORCE, node, list(value.stride()), like=node)
        node.replace_all_uses_with(forced, delete_user_cb=lambda user, new=forced: user is not new)
    gm.recompile()
    return gm


def _is_shared(node: Node) -> bool:
    value = example(node) if calls(node, *_COMPUTED_WHERE_USED) else None
    fixed = value is not None and all(isinstance(size, int) for size in value.shape)
    return fixed and _readers_outside(node) > 1


def _readers_outside(node: Node) -> int:
    """How many calls read a value, or a view of it, from memory."""
    count = 0
    for user in node.users:
        if viewed(user) is node:
            count += _readers_outside(user)
        elif calls(user, *_OUTSIDE) or getattr(user.target, "namespace", "") == "lsync":
            count += 1
    return count

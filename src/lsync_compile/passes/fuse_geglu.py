"""Gate a feed-forward's hidden channels in one kernel.

::

    h = linear(x, w, b)
    a, g = h.chunk(2, dim=-1)
    y = a * gelu(g)              ->    y = lsync.geglu(h)

The gelu must be the exact one, the halves those of the last dimension, and nothing else may use
them. Inductor makes one kernel of the same operations that takes as long (see docs/kernels.md):
the pass is for graphs that run without Inductor.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from lsync_compile.graph.build import call, drop, example, replace
from lsync_compile.graph.match import MULTIPLY, argument, calls, operands, sole_user
from lsync_compile.kernels.geglu import SPEC
from lsync_compile.passes.kernel_pass import KernelPass
from lsync_compile.passes.spec import PassContext, PassSpec, Phase, register

OP = torch.ops.lsync.geglu.default


@register
class FuseGeglu(KernelPass):
    """Counts the products."""

    spec = PassSpec(
        name="fuse_geglu",
        phase=Phase.REWRITE,
        option="fuse_geglu",
        after=("fuse_temporal_attention",),
        exact=False,
        summary="The gate of each feed-forward, `a * gelu(g)`, in one kernel; rounding differs.",
        source="Shazeer (2020), https://arxiv.org/abs/2002.05202",
    )
    kernel = SPEC

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        matches = 0
        for node in list(gm.graph.nodes):
            hidden = gated(node)
            if hidden is not None and self.takes(hidden, context):
                with gm.graph.inserting_before(node):
                    replace(node, call(gm.graph, OP, hidden, like=node))
                drop(node)
                matches += 1
        return matches


def gated(product: Node) -> Node | None:
    """``h`` where the node is ``h[..., :C] * gelu(h[..., C:])``."""
    factors = operands(product, MULTIPLY)
    if factors is None:
        return None
    for value, gelu in (factors, factors[::-1]):
        if not calls(gelu, F.gelu) or argument(gelu, 1, "approximate", "none") != "none":
            continue
        gate = argument(gelu, 0, "input")
        halves = _half(gate, 1)
        if halves is not None and halves is _half(value, 0) and len(halves.users) == 2:
            alone = all(sole_user(node) is not None for node in (value, gelu, gate))
            hidden = argument(halves, 0, "input")
            return hidden if alone and isinstance(hidden, Node) else None
    return None


def _half(node: Any, index: int) -> Node | None:
    """``t`` where the node is ``t[index]`` and ``t`` the halves of a tensor's last dimension."""
    if not calls(node, operator.getitem) or node.args[1] != index:
        return None
    halves = node.args[0]
    if not calls(halves, torch.chunk, "chunk") or argument(halves, 1, "chunks") != 2:
        return None
    whole = example(argument(halves, 0, "input"))
    if whole is None or whole.shape[-1] % 2:
        return None
    return halves if argument(halves, 2, "dim", 0) in (-1, whole.dim() - 1) else None

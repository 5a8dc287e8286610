"""Gate a feed-forward's hidden channels in the product that makes them.

::

    h = linear(x, w, b)
    a, g = h.chunk(2, dim=-1)
    y = a * gelu(g)              ->    y = lsync.linear_geglu(x, w, b)

also where :mod:`~lsync_compile.passes.fuse_geglu` has made ``lsync.geglu(h)`` of the gate. Nothing
else may use the hidden channels. The op times its own kernels and the library's product with the
gate after it, once for each shape, so that the pass costs nothing where the library is faster.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from lsync_compile.graph.build import call, drop, replace
from lsync_compile.graph.match import argument, calls, share_dtype, sole_user
from lsync_compile.kernels.linear_geglu import SPEC
from lsync_compile.passes.fuse_geglu import OP as GATE
from lsync_compile.passes.fuse_geglu import gated
from lsync_compile.passes.kernel_pass import KernelPass
from lsync_compile.passes.spec import PassContext, PassSpec, Phase, register

OP = torch.ops.lsync.linear_geglu.default


@register
class FuseLinearGeglu(KernelPass):
    """Counts the feed-forwards."""

    spec = PassSpec(
        name="fuse_linear_geglu",
        phase=Phase.REWRITE,
        option="fuse_linear_geglu",
        after=("fuse_geglu",),
        exact=False,
        summary="Each feed-forward's first projection with its gate, `a * gelu(g)`, in one kernel "
        "where that is faster; rounding differs.",
        source="Shazeer (2020), https://arxiv.org/abs/2002.05202",
    )
    kernel = SPEC

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        matches = 0
        for node in list(gm.graph.nodes):
            hidden = argument(node, 0, "x") if calls(node, GATE) else gated(node)
            operands = _projection(hidden)
            if operands is None or not self.takes(operands[0], context):
                continue
            with gm.graph.inserting_before(node):
                replace(node, call(gm.graph, OP, *operands, like=node))
            drop(node)
            matches += 1
        return matches


def _projection(hidden: Any) -> tuple[Node, Node, Node | None] | None:
    """Input, weight and bias of a linear layer that the gate alone uses."""
    if not calls(hidden, F.linear) or sole_user(hidden) is None:
        return None
    x, weight = argument(hidden, 0, "input"), argument(hidden, 1, "weight")
    bias = argument(hidden, 2, "bias")
    return (x, weight, bias) if share_dtype(x, weight, bias) else None

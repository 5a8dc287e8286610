"""Normalise by our kernel what `fuse_add_layer_norm` has left: norms of no sum.

Case 1, at the entrance of a transformer or motion module, after its projection::

    n = layer_norm(x, (C,), w, b, eps)   ->    n = lsync.layer_norm(x, w, b, eps)

Case 2, where frames are told their numbers after the norm, rows sorted by batch and frame, as
:mod:`~lsync_compile.passes.fuse_temporal_attention` leaves it::

    m = n.unflatten(0, (b, f)) + p       # p (f, 1, C)
    y = m.flatten(0, 1)                  ->    y = lsync.layer_norm(x, w, b, eps, p')

Case 3, the same where each row is a position and holds its frames::

    y = n + p                            # n (N, f, C), p (1, f, C)

Cases 2 and 3 ask that nothing else uses the norm. The pass stays away from norms over more than the
last dimension or without weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from lsync_compile.graph.build import call, drop, example, replace
from lsync_compile.graph.match import argument
from lsync_compile.kernels.layer_norm import SPEC
from lsync_compile.passes.fuse_add_layer_norm import Position, frames_added, normalised
from lsync_compile.passes.kernel_pass import KernelPass
from lsync_compile.passes.spec import PassContext, PassSpec, Phase, register

OP = torch.ops.lsync.layer_norm.default


@register
class FuseLayerNorm(KernelPass):
    """Case by case above; counts the norms."""

    spec = PassSpec(
        name="fuse_layer_norm",
        phase=Phase.REWRITE,
        option="fuse_layer_norm",
        after=("fuse_add_layer_norm",),
        exact=False,
        summary="Layer norms of no sum, with the frame's encoding where there is one, in one "
        "kernel; rounding differs.",
        source="Ba et al. (2016), https://arxiv.org/abs/1607.06450",
    )
    kernel = SPEC

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        return sum(self._fuse(node, context) for node in list(gm.graph.nodes))

    def _fuse(self, norm: Node, context: PassContext) -> bool:
        x = normalised(norm)
        if x is None or not self.takes(x, context):
            return False
        parameters = (
            argument(norm, 2, "weight"),
            argument(norm, 3, "bias"),
            argument(norm, 4, "eps", 1e-5),
        )
        position = frames_added(norm)
        last = norm if position is None else position.last
        with norm.graph.inserting_before(last):
            if position is None:
                new = call(norm.graph, OP, x, *parameters, like=norm)
            else:
                new = _with_position(norm, x, parameters, position)
        replace(last, new)
        drop(last)
        return True


def _with_position(norm: Node, x: Node, parameters: tuple[Any, ...], position: Position) -> Node:
    """Insert the op for cases 2 and 3, and give the norm in its shape."""
    graph, value = norm.graph, example(norm)
    assert value is not None  # frames_added() has looked at it
    channels = value.shape[2]
    table = call(graph, "reshape", position.table, position.frames, channels, like=norm)
    if position.rows_are_frames:
        return call(graph, OP, x, *parameters, table, like=norm)
    # Positions times frames as rows of one token: the table repeats along the rows.
    rows = call(graph, "reshape", x, -1, 1, channels, like=norm)
    new = call(graph, OP, rows, *parameters, table, like=norm)
    return call(graph, "view", new, *value.shape, like=norm)

"""Convolve a picture that was enlarged twice without enlarging it.

::

    u = interpolate(x, scale_factor=2.0, mode="nearest")
    y = conv2d(u, w, c, padding=1)   # 3x3        ->    y = lsync.upsample_conv(x, w, c, p)

where ``p``, the weights of four 2x2 convolutions, is computed of ``w`` alone and so once
(``hoist_weights``). Between the two may be views that end in the shape they began with, such as
folding frames out of a batch and in again. A video ``b c f h w`` may be enlarged too, in height and
width alone, with views between that put its frames into the batch. Nothing else may use the
enlarged picture. The op times
the four convolutions and the library's, once for each shape.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from lsync_compile.graph.axes import Axes, after_view, arrange, merged, viewed, whole
from lsync_compile.graph.build import call, drop, example, inline, replace
from lsync_compile.graph.match import argument, calls, convolves, share_dtype, sole_user
from lsync_compile.kernels.upsample_conv import SPEC, phases_of
from lsync_compile.passes.kernel_pass import KernelPass
from lsync_compile.passes.spec import PassContext, PassSpec, Phase, register

OP = torch.ops.lsync.upsample_conv.default


@register
class FuseUpsampleConv(KernelPass):
    """Counts the convolutions."""

    spec = PassSpec(
        name="fuse_upsample_conv",
        phase=Phase.REWRITE,
        option="fuse_upsample_conv",
        # Which takes some convolutions' bias.
        after=("fuse_group_norm_silu",),
        exact=False,
        summary="Convolutions of pictures enlarged twice as four smaller ones of the picture "
        "itself, where that is faster: 4/9 of the products; rounding differs.",
        source="Shi et al. (2016), https://arxiv.org/abs/1609.05158",
    )
    kernel = SPEC

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        matches = 0
        for node in list(gm.graph.nodes):
            x = _enlarged(argument(node, 0, "input")) if _is_3x3(node) else None
            if x is None or not self.takes(x, context):
                continue
            with gm.graph.inserting_before(node):
                _rewrite(gm.graph, node, _frames(gm.graph, x, node))
            matches += 1
        return matches


def _rewrite(graph: Graph, node: Node, x: Node) -> None:
    weight, bias = argument(node, 1, "weight"), argument(node, 2, "bias")
    value = example(weight)
    assert value is not None  # _is_3x3() has looked at it
    wide = call(graph, "float", weight, like=node)  # sums are rounded once, to the weight's dtype
    phases = call(graph, "to", inline(graph, phases_of, wide, like=node), value.dtype, like=node)
    replace(node, call(graph, OP, x, weight, bias, phases, like=node))
    drop(node)


def _is_3x3(node: Node) -> bool:
    """Whether a node convolves 3x3 at every pixel, with a margin of zeros of one pixel."""
    weight, bias = argument(node, 1, "weight"), argument(node, 2, "bias")
    return convolves(node, 3) and share_dtype(node, weight, bias)


def _enlarged(node: Any) -> Node | None:
    """``x`` where the node is ``x`` enlarged twice, perhaps viewed in other shapes between."""
    views: list[Node] = []
    while isinstance(node, Node) and sole_user(node) is not None:
        if calls(node, F.interpolate):
            return _source(node) if _arranged(node, views[::-1]) else None
        source = viewed(node)
        if source is None:
            return None
        views.append(node)
        node = source
    return None


def _source(node: Node) -> Node | None:
    """What is enlarged, twice in both directions and by the nearest pixel."""
    x, size = argument(node, 0, "input"), argument(node, 1, "size")
    factor, mode = argument(node, 2, "scale_factor"), argument(node, 3, "mode", "nearest")
    before, after = example(x), example(node)
    if before is None or after is None or before.dim() not in (4, 5) or mode != "nearest":
        return None
    twice = (1,) * (before.dim() - 4) + (2, 2)  # frames stay as many as they are
    sides = zip(twice, before.shape[2:], strict=True)
    doubled = tuple(times * side for times, side in sides) == tuple(after.shape[2:])
    factors = tuple(factor) if isinstance(factor, (tuple, list)) else (factor,) * len(twice)
    exact = size is not None or factors == twice
    same = before.dtype == after.dtype and isinstance(x, Node)
    return x if doubled and exact and same else None


def _arranged(node: Node, views: list[Node]) -> bool:
    """Whether views end in the shape of pictures: as they began, or with frames in the batch."""
    value = example(node)
    assert value is not None  # a tensor that was just enlarged
    axes: Any = whole(tuple(value.shape))
    for view in views:
        axes = after_view(view, axes)
        if axes is None:
            return False
    return bool(axes == _pictures(value))


def _pictures(value: Tensor) -> Axes:
    """The axes of a batch of pictures; of a video, ``b c f h w``, those of its frames."""
    start = whole(tuple(value.shape))
    if len(start) == 4:
        return start
    batch, channels, frames, *rest = start
    return (merged((*batch, *frames)), channels, *rest)


def _frames(graph: Graph, x: Node, like: Node) -> Node:
    """A batch of pictures: ``x`` itself, or the frames of a video."""
    value = example(x)
    assert value is not None  # _source() has looked at it
    return arrange(graph, x, whole(tuple(value.shape)), _pictures(value), like)

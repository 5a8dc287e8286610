"""Take a transformer's last projection into the product that ends its feed-forward.

Case 1, a projection of the block's result, as at the end of a motion module::

    t, n = lsync.add_layer_norm(x, r, …)
    h = lsync.linear_geglu(n, w1, b1)          v' = [v w, v]
    s = linear(h, w, b) + t                    c' = v b + c
    y = linear(s, v, c)                  ->    y = lsync.feed_forward(x, r, …, w1, b1, v', c')

Case 2, a 1x1 convolution with views before it, as at the end of a transformer within pictures. The
op's result is arranged as the convolution's was, with the channels of a pixel together in memory::

    y = conv2d(view(s), v, c)            ->    y = view(lsync.feed_forward(x, r, …, w1, b1, v', c'))

Case 3, what ``null_audio`` leaves of attention to the sound before either: rows that are all the
same are not written out::

    x = cat([b.expand(n, …), a])         ->    lsync.feed_forward(a, r, …, v', c', b)

``v'`` and ``c'`` are made of weights alone, and so once (``hoist_weights``). Nothing else may see
the sum ``t``, its norm, the gated channels or the block's result. The same arithmetic in another
order: ``v (w h + b + t) + c``.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node

from lsync_compile.graph.axes import Axes, Digit, after_view, arrange, viewed, whole
from lsync_compile.graph.build import call, drop, example, inline, replace
from lsync_compile.graph.match import (
    ADD,
    argument,
    calls,
    convolves,
    operands,
    share_dtype,
    sole_user,
)
from lsync_compile.kernels.feed_forward import SPEC, joined_bias, joined_weight
from lsync_compile.passes.fuse_add_layer_norm import OP as NORM
from lsync_compile.passes.fuse_linear_geglu import OP as GATED
from lsync_compile.passes.kernel_pass import KernelPass
from lsync_compile.passes.spec import PassContext, PassSpec, Phase, register

OP = torch.ops.lsync.feed_forward.default
OUT = "out"  # names the index of the last projection's channels
_OF_NORM = ("residual", "weight", "bias")  # arguments of add_layer_norm after x


@register
class FuseFeedForward(KernelPass):
    """Case by case above; counts the blocks."""

    spec = PassSpec(
        name="fuse_feed_forward",
        phase=Phase.REWRITE,
        option="fuse_feed_forward",
        # The last takes linear layers where it is on.
        after=("fuse_add_layer_norm", "fuse_linear_geglu", "fp8_linear"),
        exact=False,
        summary="A feed-forward's second projection, its residual sum and the transformer's last "
        "projection as one product of the gated channels and the sum before; rounding differs.",
    )
    kernel = SPEC

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        matches = 0
        for gated in list(gm.graph.nodes):
            block = _block(gated)
            if block is None or not self.takes(block.total, context):
                continue
            with gm.graph.inserting_before(block.last):
                _rewrite(gm.graph, block)
            matches += 1
        return matches


@dataclass(frozen=True)
class _Block:
    """The parts of a match: nodes of the graph, and how the last projection arranges its result."""

    norm: Node
    total: Node
    gated: Node
    out: Node
    last: Node
    axes: Axes


def _block(gated: Node) -> _Block | None:
    """The whole pattern around a gated projection."""
    if not calls(gated, GATED):
        return None
    normed, out = argument(gated, 0, "x"), sole_user(gated)
    if not calls(normed, operator.getitem) or out is None or not calls(out, F.linear):
        return None
    norm, added = normed.args[0], sole_user(out)
    terms = operands(added, ADD)
    if terms is None or not calls(norm, NORM) or argument(norm, 5, "position") is not None:
        return None
    total = terms[1] if terms[0] is out else terms[0]
    parts = calls(total, operator.getitem) and total.args == (norm, 0) and normed.args[1] == 1
    alone = all(sole_user(node) is not None for node in (total, normed))
    if not parts or not alone or argument(out, 0, "input") is not gated:
        return None
    assert added is not None  # it has two terms
    projection = _projection(added)
    if projection is None:
        return None
    last, axes = projection
    parameters = [
        argument(node, place, name)
        for node in (gated, out, last)
        for place, name in ((1, "weight"), (2, "bias"))
    ]
    if not share_dtype(total, *parameters):
        return None
    return _Block(norm, total, gated, out, last, axes)


def _projection(result: Node) -> tuple[Node, Axes] | None:
    """What alone projects the channels of ``result``, and the axes of what it gives."""
    value = example(result)
    if value is None or value.dim() < 2:
        return None
    channels = value.dim() - 1
    axes: Axes | None = whole(tuple(value.shape))
    source, node = result, sole_user(result)
    while node is not None and axes is not None and viewed(node) is source:
        source, axes, node = node, after_view(node, axes), sole_user(node)
    if node is None or axes is None or argument(node, 0, "input") is not source:
        return None
    place = len(axes) - 1 if calls(node, F.linear) else 1
    whole_channels = (Digit(channels, 1, value.shape[-1]),)
    if not (calls(node, F.linear) or convolves(node, 1)) or axes[place] != whole_channels:
        return None
    weight = example(argument(node, 1, "weight"))
    if weight is None or weight.shape[0] < 2:
        return None
    given = (Digit(OUT, 1, weight.shape[0]),)
    return node, (*axes[:place], given, *axes[place + 1 :])


def _rewrite(graph: Graph, block: _Block) -> None:
    last, value = block.last, example(block.total)
    assert value is not None  # takes() has looked at it
    weight, bias = _joined(graph, block, value.dtype)
    x, null = _given(argument(block.norm, 0, "x"))
    summed = [argument(block.norm, 1 + i, name) for i, name in enumerate(_OF_NORM)]
    eps = argument(block.norm, 4, "eps", 1e-5)
    products = argument(block.gated, 1, "weight"), argument(block.gated, 2, "bias"), weight, bias
    made = call(graph, OP, x, *summed, eps, *products, null, like=last)
    have = (*whole(tuple(value.shape[:-1])), (Digit(OUT, 1, _outside(last)),))
    replace(last, arrange(graph, made, have, block.axes, last))
    drop(last)


def _given(x: Any) -> tuple[Node, Node | None]:
    """Case 3: the rows that are not all the same, and what the others are."""
    parts = argument(x, 0, "tensors") if calls(x, torch.cat) else None
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or argument(x, 1, "dim", 0) != 0:
        return x, None
    same, given = parts
    row = same.args[0] if calls(same, "expand") else None
    value, whole_batch = example(row), example(x)
    assert whole_batch is not None  # an operand of the norm
    if value is None or value.shape != whole_batch.shape[-1:] or value.dtype != whole_batch.dtype:
        return x, None
    return given, row


def _joined(graph: Graph, block: _Block, dtype: torch.dtype) -> tuple[Node, Node | None]:
    """Weight and bias of the one product, of weights alone."""
    last = block.last

    def wide(node: Node) -> Node:
        return call(graph, "float", node, like=last)

    weight, bias = argument(block.out, 1, "weight"), argument(block.out, 2, "bias")
    outer, outer_bias = argument(last, 1, "weight"), argument(last, 2, "bias")
    matrix = wide(call(graph, "reshape", outer, _outside(last), -1, like=last))
    joined = inline(graph, joined_weight, wide(weight), matrix, like=last)
    shift = outer_bias
    if bias is not None:
        shift = inline(graph, joined_bias, wide(bias), matrix, like=last)
        if outer_bias is not None:
            shift = call(graph, torch.add, shift, wide(outer_bias), like=last)
        shift = call(graph, "to", shift, dtype, like=last)
    return call(graph, "to", joined, dtype, like=last), shift


def _outside(last: Node) -> int:
    weight = example(argument(last, 1, "weight"))
    assert weight is not None  # _projection() has looked at it
    return int(weight.shape[0])

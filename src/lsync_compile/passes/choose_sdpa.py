"""Let the fastest kernel attend, for each shape its own.

torch takes the first attention kernel of a fixed order that can run, when the graph is compiled.
The op asks which one is fastest, and reads and writes rows of tokens::

    q = linear(x, wq).view(n, l, h, d).transpose(1, 2)
    k = linear(y, wk).view(n, s, h, d).transpose(1, 2)
    v = linear(y, wv).view(n, s, h, d).transpose(1, 2)
    a = scaled_dot_product_attention(q, k, v)
    y = a.transpose(1, 2).flatten(2)

    ->

    y = lsync.spatial_attention(linear(x, wq), linear(y, wk), linear(y, wv), h)

Heads are split in the op, as views. Where queries, keys or values are no such views, they are
brought into rows; where something else uses the split result, it is given it.

The pass stays away from masks, dropout, causal order, shared heads, and keys and values of unlike
widths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lsync_compile.graph.attention import Attention, plain_attentions
from lsync_compile.graph.axes import Axes, after_view, permuted, regrouped, viewed, whole
from lsync_compile.graph.build import call, example, replace
from lsync_compile.kernels.spatial_attention import SPEC
from lsync_compile.passes.kernel_pass import KernelPass
from lsync_compile.passes.spec import PassContext, PassSpec, Phase, register

OP = torch.ops.lsync.spatial_attention.default


@register
class ChooseSdpa(KernelPass):
    """Counts the attentions."""

    kernel = SPEC
    spec = PassSpec(
        name="choose_sdpa",
        phase=Phase.REWRITE,
        option="choose_sdpa",
        after=("fuse_temporal_attention",),
        exact=False,
        summary="Attends within frames and to the sound with the fastest kernel for each shape, "
        "a library's or ours. Rounds otherwise.",
        source="Vaswani et al. (2017), https://arxiv.org/abs/1706.03762",
    )

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        found = [each for each in plain_attentions(gm.graph) if self._fits(each, context)]
        for each in found:
            attend_by_rows(each, OP, each.scale)
        return len(found)

    def _fits(self, found: Attention, context: PassContext) -> bool:
        query, key, value = (example(operand) for operand in found.operands)
        if query is None or key is None or value is None:
            return False
        same = key.shape == value.shape and query.dtype == key.dtype == value.dtype
        rows = (query.shape[0], query.shape[1], query.shape[3])
        same = same and rows == (key.shape[0], key.shape[1], key.shape[3])
        return same and query.numel() > 0 and self.takes(found.node, context)


def attend_by_rows(found: Attention, op: Callable[..., Any], *settings: Any) -> None:
    """Replace an attention by ``op(q, k, v, heads, *settings)``, which takes rows of tokens."""
    node, graph = found.node, found.node.graph
    _, heads, _, width = _shape(node)
    with graph.inserting_before(node):
        rows = [_rows(operand) for operand in found.operands]
        new = call(graph, op, *rows, heads, *settings, like=node)
        for merged in _merges(node):
            replace(merged, new)
        split = call(graph, "unflatten", new, 2, (heads, width), like=node)
        replace(node, call(graph, "transpose", split, 1, 2, like=node))


def _rows(operand: Node) -> Node:
    """``(N, L, heads*head_dim)`` that the operand splits; made of it where there is none."""
    n, heads, length, width = _shape(operand)
    chain = [operand]
    while (source := viewed(chain[-1])) is not None:
        chain.append(source)
    for depth, root in enumerate(chain):
        if _shape(root) == (n, length, heads * width):
            axes = _followed(chain[depth - 1 :: -1], whole(_shape(root)))
            if axes == _split(n, heads, length, width):
                return root
    turned = call(operand.graph, "transpose", operand, 1, 2, like=operand)
    return call(operand.graph, "flatten", turned, 2, like=operand)


def _merges(node: Node) -> list[Node]:
    """The views of an attention's result that are its rows, ``(N, L, heads*head_dim)``."""
    n, heads, length, width = _shape(node)
    start = _split(n, heads, length, width)
    rows = whole((n, length, heads * width))
    found = []
    waiting = [(node, start)]
    while waiting:
        source, axes = waiting.pop()
        for user in source.users:
            following = _followed([user], axes) if viewed(user) is source else None
            if following == rows and len(_shape(user)) == 3:
                found.append(user)
            elif following is not None:
                waiting.append((user, following))
    return found


def _followed(views: list[Node], axes: Axes) -> Axes | None:
    """The axes after a chain of views."""
    following: Axes | None = axes
    for view in views:
        if following is None:
            return None
        following = after_view(view, following)
    return following


def _split(n: int, heads: int, length: int, width: int) -> Axes:
    """``(N, heads, L, head_dim)`` in digits of ``(N, L, heads*head_dim)``."""
    axes = regrouped(whole((n, length, heads * width)), (n, length, heads, width))
    assert axes is not None  # the last dimension is their product
    return permuted(axes, (0, 2, 1, 3))


def _shape(node: Node) -> tuple[int, ...]:
    value = example(node)
    return () if value is None else tuple(value.shape)

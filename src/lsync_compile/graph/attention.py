"""Attention in a captured graph: its arguments, and where queries, keys and values come from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from lsync_compile import kernels  # noqa: F401  registers the operators named here
from lsync_compile.graph.axes import viewed
from lsync_compile.graph.build import example

_OPS = (
    torch.ops.lsync.temporal_attention.default,
    torch.ops.lsync.spatial_attention.default,
    torch.ops.lsync.lip_attention.default,
)
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass(frozen=True)
class Attention:
    """One call of ``scaled_dot_product_attention`` with nothing but a scale.

    Attributes:
        node: the call.
        query, key, value: ``(N, heads, L, head_dim)`` and twice ``(N, heads, S, head_dim)``.
        scale: factor of the scores; None for the usual ``head_dim ** -0.5``.
    """

    node: Node
    query: Node
    key: Node
    value: Node
    scale: float | None

    @property
    def operands(self) -> tuple[Node, Node, Node]:
        return self.query, self.key, self.value


def attention(node: Node) -> Attention | None:
    """The node as plain 4-D attention: no mask, dropout, causal order or shared heads."""
    if node.op != "call_function" or node.target is not F.scaled_dot_product_attention:
        return None
    given = dict(zip(_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
    query, key, value = (given.get(name) for name in _ARGUMENTS[:3])
    scale = given.get("scale")
    if any(given.get(name) for name in ("dropout_p", "is_causal", "enable_gqa")):
        return None
    if given.get("attn_mask") is not None or not isinstance(scale, (int, float, type(None))):
        return None
    if not (isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)):
        return None
    shapes = [_shape(operand) for operand in (query, key, value)]
    if any(shape is None or len(shape) != 4 for shape in shapes):
        return None
    return Attention(node, query, key, value, scale)


def plain_attentions(graph: Graph) -> list[Attention]:
    """All plain attention of a graph, in execution order."""
    found = (attention(node) for node in graph.nodes)
    return [each for each in found if each is not None]


def projection(operand: Node) -> Node | None:
    """The ``linear`` that an attention's operand is a view of; None where it is another thing."""
    node: Node | None = operand
    while node is not None:
        if node.op == "call_function" and node.target is F.linear:
            return node
        node = viewed(node)
    return None


def projections(node: Node) -> list[Node]:
    """The ``linear`` calls that queries, keys and values of an attention are views of.

    Args:
        node: plain attention, or one of this package's ops whose first arguments are q, k and v.
    """
    found = attention(node)
    if found is not None:
        operands: tuple[object, ...] = found.operands
    elif node.op == "call_function" and node.target in _OPS:
        operands = node.args[:3]
    else:
        return []
    linears = [projection(operand) for operand in operands if isinstance(operand, Node)]
    return [linear for linear in linears if linear is not None]


def _shape(node: Node) -> torch.Size | None:
    value = example(node)
    if value is None or not all(isinstance(size, int) for size in value.shape):
        return None
    return value.shape

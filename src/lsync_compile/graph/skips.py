"""Skip joins of a UNet, found by dependency alone.

A U-shaped network concatenates, on the way up, what comes from below with what it kept on the way
down. In the graph that is ``cat([below, kept], 1)`` where ``below`` was computed from ``kept``:
nothing else in these networks has that shape, whatever the modules are called.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


@dataclass(frozen=True)
class SkipJoin:
    """One join.

    Attributes:
        node: the concatenation along the channels.
        below: its first operand, from the deeper levels.
        kept: its second operand, an ancestor of the first.
    """

    node: Node
    below: Node
    kept: Node


def skip_joins(graph: Graph) -> list[SkipJoin]:
    """All skip joins in execution order, the innermost level first."""
    found = []
    for node in graph.nodes:
        operands = _channel_operands(node)
        if operands is not None and depends_on(operands[0], operands[1]):
            found.append(SkipJoin(node, *operands))
    return found


def depends_on(node: Node, ancestor: Node) -> bool:
    """Whether ``node`` is computed from ``ancestor`` (a node does not depend on itself)."""
    waiting = list(node.all_input_nodes)
    seen = set(waiting)
    while waiting:
        current = waiting.pop()
        if current is ancestor:
            return True
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return False


def _channel_operands(node: Node) -> tuple[Node, Node] | None:
    """The two operands of a concatenation along dimension 1."""
    if node.op != "call_function" or node.target not in CONCATENATIONS or not node.args:
        return None
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    operands = node.args[0]
    if dim != 1 or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return None
    first, second = operands
    return (first, second) if isinstance(first, Node) and isinstance(second, Node) else None

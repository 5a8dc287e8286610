"""The strides of a graph's results, which passes may change and callers may rely on.

Whoever takes a result may have been compiled for its strides: other ones in the first step of a
loop than in the second would cost a recompilation. Passes work in whatever layout suits them, and
the results are copied back at the end. They are small beside what lies between.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Graph, Node
from torch.fx.node import map_arg

from lsync_compile.graph.build import call, example

Strides = tuple[int, ...] | None


def result_strides(graph: Graph) -> list[Strides]:
    """Strides of each result in order; None where it is no tensor."""
    values = [example(node) for node in _results(graph)]
    return [None if value is None else value.stride() for value in values]


def restore_strides(graph: Graph, strides: Sequence[Strides]) -> int:
    """Copy results whose strides are not these back to them, and say how many.

    Results are told by their place. One with gaps between its elements gets strides in the same
    order without them.
    """
    output, restored = graph.output_node(), {}
    for result, wanted in zip(_results(graph), strides, strict=True):
        value = example(result)
        if value is None or wanted is None or value.stride() == wanted:
            continue
        if result not in restored:
            with graph.inserting_before(output):
                restored[result] = _arranged(result, wanted)
    for result, copy in restored.items():
        output.replace_input_with(result, copy)
    return len(restored)


def _arranged(result: Node, strides: tuple[int, ...]) -> Node:
    """Insert a copy whose dimensions lie in memory in the order of these strides."""
    order = sorted(range(len(strides)), key=lambda dim: strides[dim], reverse=True)
    back = [order.index(dim) for dim in range(len(strides))]
    turned = call(result.graph, "permute", result, *order, like=result)
    copy = call(result.graph, "contiguous", turned, like=result)
    return call(result.graph, "permute", copy, *back, like=result)


def _results(graph: Graph) -> list[Node]:
    found: list[Node] = []

    def note(node: Node) -> Node:
        found.append(node)
        return node

    map_arg(graph.output_node().args, note)
    return found

"""A second copy of a graph that shares the first one's modules and metadata values."""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node


def copy_graph(gm: GraphModule) -> GraphModule:
    """Copy the graph, not the weights: passes may change one without touching the other."""
    graph = Graph()
    table: dict[Node, Node] = {}
    output = graph.graph_copy(gm.graph, table, return_output_node=True)
    assert isinstance(output, tuple)  # (result, original node), as asked for
    graph.output(output[0]).meta.update(output[1].meta)
    return GraphModule(gm, graph)

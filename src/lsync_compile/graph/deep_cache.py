"""Cut a UNet's graph in two at a skip join: all of it, and its outermost layers alone.

From one denoising step to the next, what a U-shaped network computes in its depth changes little
(DeepCache, Ma et al. 2023, arXiv:2312.00858). One graph becomes two whole ones::

    x = conv_in(sample)                full:     ..., returns out, d
    d = deep(x)                 ->
    y = outer(cat([d, x], 1))          shallow:  x = conv_in(sample)
    return out(y)                                y = outer(cat([cached, x], 1))
                                                 return out(y)

The deep features cross as an explicit result and an explicit input. Both graphs take the captured
graph's inputs in the same order, and every node of theirs is the captured operation.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from lsync_compile.graph.build import drop_unused, example
from lsync_compile.graph.copying import copy_graph
from lsync_compile.graph.purity import has_writes
from lsync_compile.graph.skips import skip_joins

CACHED = "lsync_cached"  # name of the shallow graph's last input
JOIN_KEY = "lsync_skip_join"  # in ``meta``: how many joins follow


@dataclass(frozen=True)
class DeepCut:
    """A graph cut at a skip join.

    Attributes:
        full: returns what the graph returns, and the deep features as one more result.
        shallow: takes the deep features as one more input, :data:`CACHED`, the last.
        features: example value of the deep features.
    """

    full: GraphModule
    shallow: GraphModule
    features: Tensor

    @property
    def operations(self) -> tuple[int, int]:
        """How many nodes compute something, in the full and in the shallow graph."""
        full, shallow = (
            sum(node.op not in ("placeholder", "output") for node in gm.graph.nodes)
            for gm in (self.full, self.shallow)
        )
        return full, shallow


def mark_joins(graph: Graph) -> int:
    """Mark the skip joins of a graph, for :func:`cut` after the passes; returns their number.

    Passes keep the joins but not always what tells them: in a prefix at half the batch, what is
    kept is doubled aside, and nothing below depends on the doubled value.
    """
    joins = skip_joins(graph)
    for index, join in enumerate(reversed(joins)):
        join.node.meta[JOIN_KEY] = index
    return len(joins)


def why_not(graph: Graph, branch: int) -> str:
    """Why a marked graph cannot be cut at this branch; the empty string where it can."""
    if has_writes(graph):
        return "the graph writes in place"
    count = sum(JOIN_KEY in node.meta for node in graph.nodes)
    if count == 0:
        return "it has no skip joins"
    join = _join(graph, branch)
    if join is None:
        return f"branch {branch} is not there; the last one is {count - 1}"
    if example(_deep(join)) is None:
        return "its deep features are no tensor"
    return ""


def cut(gm: GraphModule, branch: int) -> DeepCut:
    """Cut a graph that :func:`why_not` has nothing against; ``gm`` is not changed.

    Args:
        gm: marked by :func:`mark_joins`.
        branch: which join, counted from the outside: 0 leaves least in the shallow graph.
    """
    full, shallow = copy_graph(gm), copy_graph(gm)
    features = _return_features(full, branch)
    _take_features(shallow, branch)
    return DeepCut(full, shallow, features)


def _return_features(gm: GraphModule, branch: int) -> Tensor:
    join = _join(gm.graph, branch)
    assert join is not None  # why_not has seen it
    deep, output = _deep(join), gm.graph.output_node()
    results = output.args[0]
    assert isinstance(results, (tuple, list))  # dynamo's graphs return tuples
    output.args = ((*results, deep),)
    _settle(gm)
    features = example(deep)
    assert features is not None  # as above
    return features


def _take_features(gm: GraphModule, branch: int) -> None:
    graph = gm.graph
    join = _join(graph, branch)
    assert join is not None  # why_not has seen it
    deep = _deep(join)
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        cached = graph.placeholder(CACHED)
    cached.meta["example_value"] = deep.meta["example_value"]
    deep.replace_all_uses_with(cached)
    _settle(gm)


def _settle(gm: GraphModule) -> None:
    drop_unused(gm.graph)
    gm.graph.lint()
    gm.recompile()


def _join(graph: Graph, branch: int) -> Node | None:
    nodes = (node for node in graph.nodes if node.meta.get(JOIN_KEY) == branch)
    return next(nodes, None)


def _deep(join: Node) -> Node:
    """The first operand of a join."""
    operands: list[Node] = []
    map_arg((join.args, join.kwargs), operands.append)
    return operands[0]

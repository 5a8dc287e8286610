"""Cut a graph by how often its values change: what is rarely new is computed apart.

:mod:`lsync_compile.graph.dependency` says of each node whether it depends on weights, timestep or
sound alone. Those nodes move into graphs of their own, one a stage, and their results become inputs
of what remains, the main graph::

    sample, audio, w ->                     audio, w ->            (once a chunk)
        k = linear(audio, w)                    k = linear(audio, w)
        v = k.view(...)               ->    sample, k ->           (each step)
        y = attend(sample, v)                   v = k.view(...)
                                                y = attend(sample, v)

Every node is the same operation on the same values as before: the bits do not change.

Some nodes are computed anew in each graph that needs them and never handed over: views, which cost
nothing; what is made from no input at all, such as ``arange``; copies much larger than what they
are made from; the graph's own results and what shares memory with them, since callers may write
into them; and the largest results of a stage once it has reached its limit of memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, GraphModule, Node

from lsync_compile.graph.dependency import Stage, node_stages, tensors
from lsync_compile.graph.purity import has_writes, result_storages, storage

MIB = 2**20
# Bytes that the results of a stage may take; of a timestep's, all that are kept together.
LIMITS: Mapping[Stage, int] = {
    Stage.WEIGHTS: 3072 * MIB,
    Stage.TIMESTEP: 64 * MIB,
    Stage.CHUNK: 768 * MIB,
}
# A copy is large when it takes more than this, and this many times what it is made from.
LARGE_BYTES, LARGE_FACTOR = MIB, 4


@dataclass(frozen=True)
class StageGraph:
    """One of the graphs that a captured graph was cut into.

    Attributes:
        gm: runs it; shares modules and attributes with the captured graph.
        inputs: for each placeholder, which value it takes: the captured graph's inputs are counted
            from 0, and the results of all stages go on from there in the order of
            :attr:`Staging.stages`.
        results: example values of what it returns, a tuple; empty for the main graph.
    """

    gm: GraphModule
    inputs: tuple[int, ...]
    results: tuple[torch.Tensor, ...] = ()

    @property
    def operations(self) -> int:
        """Nodes that compute something."""
        return sum(node.op not in ("placeholder", "output") for node in self.gm.graph.nodes)

    @property
    def result_bytes(self) -> int:
        return sum(map(_bytes, self.results))


@dataclass(frozen=True)
class Staging:
    """A graph cut into stages.

    Attributes:
        stages: by stage, in the order of :class:`Stage`; only those that have results. The later
            ones may take results of the first, and of no other.
        main: computes the captured graph's outputs.
        weights: the captured inputs that are weights and that a stage looks at.
        watched: by stage, the captured inputs that are no weights and that it looks at. Inputs
            behind a node that a pass has marked (``dependency.STAGE_KEY``) are not among them.
    """

    stages: dict[Stage, StageGraph]
    main: StageGraph
    weights: tuple[int, ...]
    watched: dict[Stage, tuple[int, ...]]


def why_not(graph: Graph) -> str:
    """Why a graph must stay in one piece; the empty string where it may be cut."""
    if has_writes(graph):
        return "the graph writes in place"
    for node in graph.nodes:
        for value in tensors(node):
            if any(isinstance(size, torch.SymInt) for size in value.shape):
                return "symbolic sizes"
    return ""


def cut(gm: GraphModule, stages: Collection[Stage], *, unet: bool) -> Staging | None:
    """Cut a graph; ``gm`` itself is not changed.

    Args:
        gm: captured by dynamo, with example values, and :func:`why_not` has nothing against it.
        stages: which may have a graph of their own; other nodes stay where they are needed.
        unet: whether it is a UNet's graph, see :func:`node_stages`.

    Returns:
        None where no stage has any result.
    """
    cutter = _Cutter(gm, {*stages} - {Stage.STEP}, node_stages(gm.graph, unet=unet))
    cutter.plan()
    return cutter.build() if any(cutter.results.values()) else None


@dataclass
class _Cutter:
    gm: GraphModule
    allowed: Collection[Stage]
    stages: Mapping[Node, Stage]
    copied: set[Node] = field(default_factory=set)  # computed anew wherever needed
    needed: dict[Node, set[Stage]] = field(default_factory=dict)
    results: dict[Stage, list[Node]] = field(default_factory=dict)

    def plan(self) -> None:
        """Find where each node is computed, and what crosses from graph to graph."""
        outputs = result_storages(self.gm.graph)
        made_of_nothing: set[Node] = set()
        for node in self.gm.graph.nodes:
            if node.op != "placeholder" and made_of_nothing.issuperset(node.all_input_nodes):
                made_of_nothing.add(node)
            if (
                node in made_of_nothing
                or self.stages[node] not in self.allowed
                or storage(node) in outputs
                or self._is_view(node)
                or _is_large_copy(node)
            ):
                self.copied.add(node)
        self._trace()
        while self._drop_the_largest():
            self._trace()

    def _trace(self) -> None:
        self.needed = {node: set() for node in self.gm.graph.nodes}
        self.results = {stage: [] for stage in Stage}
        for node in reversed(self.gm.graph.nodes):
            places, home = self.needed[node], self.stages[node]
            if node.op == "output" or (node.op != "placeholder" and node.is_impure()):
                places.add(Stage.STEP)
            if node.op == "placeholder" or not places:
                continue
            if node not in self.copied and _is_tensor(node) and places != {home}:
                self.results[home].append(node)
                places.add(home)
                places = {home}
            for source in node.all_input_nodes:
                self.needed[source] |= places
        for found in self.results.values():
            found.reverse()

    def _drop_the_largest(self) -> bool:
        """Keep the results of a stage that fit, the smallest first."""
        dropped = False
        for stage, limit in LIMITS.items():
            total = 0
            for node in sorted(self.results[stage], key=_node_bytes):
                total += _node_bytes(node)
                if total > limit:
                    self.copied.add(node)
                    dropped = True
        return dropped

    def _is_view(self, node: Node) -> bool:
        """Whether the node's value lies in the memory of its inputs."""
        if not node.all_input_nodes:
            return False
        if len(node.all_input_nodes) == 1 and not _is_tensor(node.all_input_nodes[0]):
            return node.all_input_nodes[0] in self.copied  # a part of a tuple
        inputs = {storage(source) for source in node.all_input_nodes}
        values = tensors(node)
        # Parts of a tuple are handed over one by one, the tuple itself never.
        return bool(values) and all(_memory(value) in inputs for value in values)

    def build(self) -> Staging:
        inputs = [node for node in self.gm.graph.nodes if node.op == "placeholder"]
        numbers = {node: index for index, node in enumerate(inputs)}
        for node in (node for stage in Stage for node in self.results[stage]):
            numbers[node] = len(numbers)
        found = {stage: self._build(stage, numbers) for stage in Stage if self.results[stage]}
        weights = [
            numbers[node]
            for node in inputs
            if self.stages[node] is Stage.WEIGHTS and self.needed[node].intersection(found)
        ]
        watched: dict[Stage, tuple[int, ...]] = {
            stage: tuple(
                numbers[node]
                for node in inputs
                if self.stages[node] is stage and stage in self.needed[node]
            )
            for stage in found
            if stage is not Stage.WEIGHTS
        }
        return Staging(found, self._build(Stage.STEP, numbers), tuple(weights), watched)

    def _build(self, stage: Stage, numbers: Mapping[Node, int]) -> StageGraph:
        """The graph of one stage, in the order of the captured one."""
        graph, table = Graph(), {}
        taken = [  # `numbers` is in order
            node
            for node in numbers
            if stage in self.needed[node]
            and (node.op == "placeholder" or self.stages[node] is not stage)
        ]
        for node in taken:
            table[node] = graph.placeholder(node.name)
            table[node].meta.update(node.meta)
        for node in self.gm.graph.nodes:
            if stage in self.needed[node] and node not in table and node.op != "output":
                table[node] = graph.node_copy(node, table.__getitem__)
        results = self.results[stage]
        if stage is Stage.STEP:
            output = self.gm.graph.output_node()
            graph.node_copy(output, table.__getitem__)
        else:
            graph.output(tuple(table[node] for node in results))
        graph.lint()
        return StageGraph(
            GraphModule(self.gm, graph),
            tuple(numbers[node] for node in taken),
            tuple(node.meta["example_value"] for node in results),
        )


def _is_large_copy(node: Node) -> bool:
    """Whether a node's value is much larger than all it is computed from."""
    size = _node_bytes(node)
    if size <= LARGE_BYTES:
        return False
    return size > LARGE_FACTOR * sum(map(_node_bytes, node.all_input_nodes))


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.Tensor)


def _node_bytes(node: Node) -> int:
    return sum(map(_bytes, tensors(node)))


def _bytes(value: torch.Tensor) -> int:
    return value.numel() * value.element_size()


def _memory(value: torch.Tensor) -> int:
    return int(value.untyped_storage()._cdata)

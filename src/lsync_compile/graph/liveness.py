"""Which memory a graph needs, and from when to when: what a memory plan is made from."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from lsync_compile.runtime.memory import Lifetime


def lifetimes(graph: Graph) -> list[Lifetime]:
    """The buffers that one run of a captured graph allocates, with time counted in nodes.

    A buffer lives from the node that makes it to the last use of it or of a view of it; what the
    graph returns lives to its end. Inputs and constants are not allocated by the run. What an
    operation allocates and frees inside itself is invisible here, and so is what Inductor saves by
    fusing: the sum of the plan is that of the graph run operation by operation.
    """
    inherited: set[int] = set()
    born: dict[int, tuple[str, int, int]] = {}  # storage -> name, bytes, first
    last: dict[int, int] = {}
    for time, node in enumerate(graph.nodes):
        for storage in _storages(node):
            key = storage._cdata
            if node.op in ("placeholder", "get_attr"):
                inherited.add(key)
            elif key not in inherited and key not in born:
                born[key] = node.name, storage.nbytes(), time
            last[key] = time
        for operand in node.all_input_nodes:
            for storage in _storages(operand):
                last[storage._cdata] = time
    names: dict[str, int] = {}
    found = []
    for key, (name, size, first) in born.items():
        names[name] = names.get(name, -1) + 1  # an operation may return several tensors
        label = f"{name}.{names[name]}" if names[name] else name
        found.append(Lifetime(label, size, first, last[key]))
    return found


def _storages(node: Node) -> list[torch.UntypedStorage]:
    if node.op == "output":
        return []
    leaves = tree_leaves(node.meta.get("example_value"))
    return [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, torch.Tensor)]

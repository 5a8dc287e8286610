"""What torch's caches of compiled code must know of ops beside their names.

A graph is found in the caches by its text, its inputs and Inductor's settings. Of an op it says the
name. The compiled code has the memory layout of the op's result built in, which our source
decides, or that of another distribution whose pass put it there: a changed one must not find the
old code.
"""

from __future__ import annotations

import hashlib
import inspect

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from lsync_compile.kernels.spec import registered
from lsync_compile.passes.plugins import loaded_uuids
from lsync_compile.sources import module_uuid

_KNOWN = frozenset({"aten", "prims", "prim", "lsync"})  # namespaces of torch's ops, and ours


class OpsKey(CustomGraphPass):
    """A pass of Inductor's that changes nothing: its ``uuid`` becomes part of the caches' keys."""

    def __init__(self, uuid: str) -> None:
        self._uuid = uuid

    def __call__(self, graph: Graph) -> None:
        pass

    def uuid(self) -> str:
        return self._uuid


def ops_key(graph: Graph) -> OpsKey | None:
    """The key of a graph's ops that are not torch's: the sources of all that they use.

    Of ops that are not ours either, nothing says whose they are: the sources of all passes of
    other distributions count. None without any op to be keyed.
    """
    overloads = {n.target for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    names = {overload._schema.name.partition("::") for overload in overloads}
    ours = sorted(name for namespace, _, name in names if namespace == "lsync")
    foreign = any(namespace not in _KNOWN for namespace, _, _ in names)
    keys = []
    for name in ours:
        module = inspect.getmodule(registered()[name].reference)
        assert module is not None  # a function of a file of ours
        keys.append(f"{name} {module_uuid(module)}")
    keys += loaded_uuids() if foreign else []
    return OpsKey(hashlib.sha256("".join(keys).encode()).hexdigest()) if keys else None

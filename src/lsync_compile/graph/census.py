"""What a graph is made of: operations by kind, floating-point operations by part."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils.flop_counter import FlopCounterMode

from lsync_compile.graph.modules import module_path
from lsync_compile.kernels.spec import KernelSpec, registered

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d)
PRODUCTS = (F.linear, torch.matmul, torch.bmm, torch.baddbmm, torch.addmm, torch.mm, torch.einsum)
ATTENTION = (F.scaled_dot_product_attention,)
_HEAVY = frozenset({*CONVOLUTIONS, *PRODUCTS, *ATTENTION})

# By module path, the first that matches; what is left is split into convolutions and the rest.
PARTS = (
    ("temporal", re.compile(r"motion_module|temporal")),
    ("self-attention", re.compile(r"\battn1\b")),
    ("cross-attention", re.compile(r"\battn2\b")),
    ("feed-forward", re.compile(r"\bff\b")),
)


@dataclass(frozen=True)
class PartCensus:
    """One part of a network: how many nodes, how many floating-point operations."""

    name: str
    nodes: int
    flops: int


@dataclass(frozen=True)
class Census:
    """A graph in numbers.

    Attributes:
        nodes: operations; inputs and the output are not counted.
        ops: how often each function or method is called, most frequent first.
        parts: sorted by floating-point operations.
        flops: floating-point operations of one run; a multiply-add counts as two. Only
            convolutions, matrix products and attention count, as is usual.
    """

    nodes: int
    ops: dict[str, int]
    parts: list[PartCensus]
    flops: int


def census(gm: GraphModule) -> Census:
    """Count a graph captured by dynamo, by shapes alone: nothing is computed.

    Raises:
        ValueError: for a graph with symbolic sizes.
    """
    nodes = [node for node in gm.graph.nodes if node.op in ("call_function", "call_method")]
    ops = Counter(op_name(node) for node in nodes)
    count: Counter[str] = Counter()
    flops: Counter[str] = Counter()
    with FlopCounterMode(display=False) as counter:
        for node in nodes:
            part = part_of(node)
            before = counter.get_total_flops()
            if node.target in _HEAVY:
                _run_on_meta(node, node.target)
            elif (kernel := _kernel_of(node)) is not None:
                _run_on_meta(node, kernel.reference)
            count[part] += 1
            flops[part] += counter.get_total_flops() - before
    parts = [PartCensus(name, count[name], flops[name]) for name in count]
    parts.sort(key=lambda part: (-part.flops, part.name))
    return Census(len(nodes), dict(ops.most_common()), parts, sum(flops.values()))


def op_name(node: Node) -> str:
    """``linear``, ``transpose``: the function's or method's own name."""
    return str(getattr(node.target, "__name__", node.target))


def part_of(node: Node) -> str:
    """The part of the network that a node belongs to, by its module's path."""
    path = module_path(node)
    for name, pattern in PARTS:
        if pattern.search(path):
            return name
    if node.target in CONVOLUTIONS or "resnets" in path:
        return "resnet and convolution"
    return "other"


def _kernel_of(node: Node) -> KernelSpec | None:
    """The kernel of this package that a node calls; its reference counts as what it replaces."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    namespace, _, name = node.target._schema.name.partition("::")
    return registered().get(name) if namespace == "lsync" else None


def _run_on_meta(node: Node, function: Any) -> None:
    args, kwargs = map_arg((node.args, node.kwargs), _meta_value)
    function(*args, **kwargs)


def _meta_value(node: Node) -> Any:
    value = node.meta["example_value"]
    if not isinstance(value, torch.Tensor):
        return value
    if any(isinstance(size, torch.SymInt) for size in value.shape):
        raise ValueError(f"{node.name} has symbolic sizes: capture with dynamic=False")
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")

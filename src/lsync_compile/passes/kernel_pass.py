"""What all passes that put a kernel of this package into a graph have in common."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from lsync_compile.graph.build import example
from lsync_compile.graph.purity import has_writes, wants_gradient
from lsync_compile.kernels.launch import runs_kernel
from lsync_compile.kernels.spec import KernelSpec
from lsync_compile.passes.spec import Pass, PassContext


class KernelPass(Pass):
    """A pass that replaces operations by an op of :mod:`lsync_compile.kernels`.

    It stays away where the kernel cannot run or would not pay: see :meth:`veto`. A subclass with
    reasons of its own calls this one's first. In ``rewrite``, :meth:`takes` says of one tensor
    whether the kernel takes it.
    """

    kernel: ClassVar[KernelSpec]

    def veto(self, gm: GraphModule, context: PassContext) -> str:
        """Switched off, gradients, autocast, writes, a CPU, an old GPU, no Triton, no dtype."""
        if context.options.kernels == "off":
            return "option kernels is 'off'"
        reason = why_no_kernel(gm.graph)
        if reason:
            return reason
        tensors = _floating_inputs(gm.graph)
        on_gpu = [tensor for tensor in tensors if tensor.is_cuda]
        if on_gpu and (lacking := self.kernel.lacks(on_gpu[0].device)):
            return lacking
        if context.options.kernels == "auto":
            if not on_gpu:
                return "no kernel runs on a CPU"
            if not runs_kernel(on_gpu[0]):
                return "Triton is not installed"
        if not any(tensor.dtype in self.kernel.tolerances for tensor in tensors):
            found = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
            return f"{self.kernel.name} does not take {', '.join(found) or 'integers'}"
        return ""

    def takes(self, node: object, context: PassContext) -> bool:
        """Whether a node's value is a tensor of a dtype, and on a device, for the kernel."""
        value = example(node)
        return (
            value is not None
            and value.dtype in self.kernel.tolerances
            and (context.options.kernels == "on" or value.is_cuda)
        )


def why_no_kernel(graph: Graph) -> str:
    """Why no kernel fits into a graph, whatever its device and dtypes; empty where one may."""
    if wants_gradient(graph):
        return "a gradient is wanted, and the kernel has none"
    if uses_autocast(graph):
        return "autocast chooses the dtypes"
    return "the graph writes in place" if has_writes(graph) else ""


def uses_autocast(graph: Graph) -> bool:
    """Whether autocast is on around the graph or in it."""
    names = (getattr(node.target, "__name__", "") for node in graph.nodes)
    kinds = {value.device.type for value in map(example, _inputs(graph)) if value is not None}
    return "_enter_autocast" in names or any(map(torch.is_autocast_enabled, kinds))


def _inputs(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _floating_inputs(graph: Graph) -> list[torch.Tensor]:
    """Without scalars: a timestep may lie on another device and be of another dtype."""
    values = map(example, _inputs(graph))
    return [v for v in values if v is not None and v.is_floating_point() and v.dim() > 0]

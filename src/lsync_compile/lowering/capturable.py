"""Which graphs cannot be captured as a CUDA graph, as far as the graph itself shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from lsync_compile.graph.purity import storage, writes_in_place

_BATCH_NORMS = (F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm)


def why_not(gm: GraphModule, example_inputs: Sequence[Any], device_type: str = "cuda") -> str:
    """Why a graph cannot be captured, as far as it shows; empty where it may be.

    Args:
        gm: the graph that is lowered.
        example_inputs: one for each placeholder; the device of each used one counts.
        device_type: that of devices with CUDA graphs.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    used = [
        (node, value)
        for node, value in zip(placeholders, example_inputs, strict=True)
        if node.users
    ]
    for node, value in used:
        if not isinstance(value, Tensor):
            return f"input {node.name} is a number that may change"
        if value.device.type != device_type:
            return f"input {node.name} is on the {value.device.type.upper()}"
        if any(isinstance(size, torch.SymInt) for size in value.shape):
            return f"input {node.name} has sizes that may change"
        if value.requires_grad and torch.is_grad_enabled():
            return "a gradient is wanted"
    devices = {value.device for _, value in used}
    if len(devices) != 1:
        return "its inputs are on several devices" if devices else "it has no inputs"
    inputs = {key for node, _ in used if (key := storage(node)) is not None}
    for node in gm.graph.nodes:
        if _writes_to(node, inputs):
            return f"{node.name} writes to an input"
    return ""


def device_of(example_inputs: Sequence[Any]) -> torch.device | None:
    """The device with CUDA graphs that any of the inputs is on."""
    tensors = (value for value in example_inputs if isinstance(value, Tensor))
    return next((tensor.device for tensor in tensors if tensor.device.type == "cuda"), None)


def _writes_to(node: Node, inputs: set[int]) -> bool:
    """Whether a node changes the memory of an input."""
    if node.target in _BATCH_NORMS:
        return _updates_statistics(node)
    if not writes_in_place(node):
        return False
    if isinstance(node.target, torch._ops.OpOverload):  # any of its arguments
        changed = node.all_input_nodes
    else:
        changed = [
            leaf
            for leaf in tree_leaves((node.args[:1], node.kwargs.get("out")))
            if isinstance(leaf, Node)
        ]
    return any((key := storage(leaf)) is None or key in inputs for leaf in changed)


def _updates_statistics(node: Node) -> bool:
    """Whether a batch norm is in training: by position 5, in all four functions."""
    training = node.kwargs.get("training", node.kwargs.get("use_input_stats"))
    if training is None and len(node.args) > 5:
        training = node.args[5]
    return training is not False

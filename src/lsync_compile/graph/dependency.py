"""What each node of a graph depends on, and so how often its value changes.

Of a denoising network's inputs the weights never change, the timestep changes from step to step but
takes few values, the sound (or the text) changes from chunk to chunk, and the sample is new in each
step. A node changes as often as the inputs it is computed from::

    k = linear(encoder_hidden_states, w)    CHUNK
    t = silu(timestep.cos())                TIMESTEP
    w = cat([wq, wk, wv])                   WEIGHTS
    y = linear(sample, w)                   STEP
    z = k + t                               STEP: sound and timestep together
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from enum import IntEnum

import torch
from torch import nn
from torch.fx import Graph, Node

from lsync_compile.graph.purity import draws_random_numbers

# Their place in the UNet's signature, in this package, in LatentSync and in diffusers.
UNET_ARGUMENTS = ("sample", "timestep", "encoder_hidden_states")

# A pass that knows better than the graph sets it in a node's ``meta``.
STAGE_KEY = "lsync_stage"

# Dynamo names inputs after their source: L['timestep'], L['kwargs']['timestep'], L['args'][1].
_POSITION = re.compile(r"l_args_(\d+)_")
_NAMED = re.compile(r"l_(?:kwargs_)?(\w+?)_")


class Stage(IntEnum):
    """How often a value changes, the rarest first."""

    WEIGHTS = 0  # computed from weights alone
    TIMESTEP = 1  # a value for each timestep
    CHUNK = 2  # the same in all steps of a chunk
    STEP = 3  # new in each step

    def join(self, other: Stage) -> Stage:
        """Stage of what is computed from values of both."""
        if other in (self, Stage.WEIGHTS):
            return self
        return other if self is Stage.WEIGHTS else Stage.STEP


# By argument of the UNet; all others may be new in each step.
_ARGUMENT_STAGES: Mapping[str, Stage] = {
    "timestep": Stage.TIMESTEP,
    "encoder_hidden_states": Stage.CHUNK,
}


def is_weight(placeholder: Node) -> bool:
    """Whether an input of the graph is a parameter or a buffer of a module."""
    value = placeholder.meta.get("example_value")
    return isinstance(value, nn.Parameter) or "_buffers_" in placeholder.name


def unet_argument(placeholder: Node) -> str | None:
    """Which argument of a UNet an input of its graph is; None for weights and unknown names."""
    if is_weight(placeholder):
        return None
    position = _POSITION.fullmatch(placeholder.name)
    if position is not None:
        index = int(position[1])
        return UNET_ARGUMENTS[index] if index < len(UNET_ARGUMENTS) else None
    named = _NAMED.fullmatch(placeholder.name)
    return named[1] if named is not None and named[1] in UNET_ARGUMENTS else None


def find_argument(graph: Graph, name: str) -> Node | None:
    """The input of a UNet's graph that is the argument ``name``."""
    inputs = (node for node in graph.nodes if node.op == "placeholder")
    return next((node for node in inputs if unet_argument(node) == name), None)


def node_stages(graph: Graph, *, unet: bool) -> dict[Node, Stage]:
    """The stage of each node.

    Args:
        graph: captured by dynamo, with example values.
        unet: whether it is a UNet's, whose arguments have a meaning. Else there are only weights
            and all the rest.
    """
    stages: dict[Node, Stage] = {}
    for node in graph.nodes:
        stages[node] = _stage_of(node, stages, unet)
    return stages


def _stage_of(node: Node, stages: Mapping[Node, Stage], unet: bool) -> Stage:
    if node.op == "placeholder":
        if is_weight(node):
            return Stage.WEIGHTS
        argument = unet_argument(node) if unet else None
        return _ARGUMENT_STAGES.get(argument or "", Stage.STEP)
    if node.op == "get_attr":
        return Stage.WEIGHTS
    if node.op not in ("call_function", "call_method") or node.is_impure():
        return Stage.STEP
    marked = node.meta.get(STAGE_KEY)
    if isinstance(marked, Stage):
        return marked
    stage = Stage.WEIGHTS
    for source in node.all_input_nodes:
        stage = stage.join(stages[source])
    if stage is Stage.STEP or not _is_repeatable(node):
        return Stage.STEP
    return stage


def _is_repeatable(node: Node) -> bool:
    """Whether the node gives tensors, the same ones again for the same inputs."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    return bool(tensors(node)) and not draws_random_numbers(node)


def tensors(node: Node) -> Collection[torch.Tensor]:
    """The tensors of the node's example value; empty where there is anything else in it."""
    value = node.meta.get("example_value")
    parts = value if isinstance(value, (list, tuple)) else (value,)
    if all(isinstance(part, torch.Tensor) for part in parts):
        return list(parts)
    return []

"""Guided batches for the passes that the runtime vouches for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from captures import capture
from torch import Tensor, nn
from torch.fx import GraphModule

from lsync_compile.graph.copying import copy_graph
from lsync_compile.graph.dependency import is_weight, unet_argument
from lsync_compile.options import Options
from lsync_compile.passes.manager import PassManager
from lsync_compile.passes.spec import Pass
from lsync_compile.report import PassRecord
from lsync_compile.runtime.context import VOUCHES


def run_vouched(
    gm: GraphModule, cls: type[Pass], vouched: frozenset[str] = frozenset(VOUCHES)
) -> tuple[GraphModule, PassRecord]:
    """A copy of the graph after this pass alone, and the record of it."""
    copy = copy_graph(gm)
    alone = type(cls.__name__, (cls,), {"spec": replace(cls.spec, after=())})
    with torch.no_grad():
        (record,) = PassManager(Options(**{cls.spec.option: True}), [alone]).run(
            copy, "unet", "graph", vouched
        )
    copy.graph.lint()
    return copy, record


def guide(gm: GraphModule, inputs: list[Any], *, silent: bool = True) -> list[Any]:
    """Captured inputs with equal samples in both halves and, if silent, no sound in the first."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    found = []
    for node, value in zip(placeholders, inputs, strict=True):
        name = None if is_weight(node) else unet_argument(node)
        if name == "sample":
            half = value[: len(value) // 2]
            value = torch.cat([half, half])
        if name == "encoder_hidden_states" and silent:
            value = torch.cat([torch.zeros_like(value).chunk(2)[0], value.chunk(2)[1]])
        found.append(value)
    return found


class Network(nn.Module):
    """A function of the UNet's arguments and one matrix."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.function(sample, timestep, encoder_hidden_states, self.weight, self.bias)


def small(
    function: Callable[..., Tensor], *, batch: int = 2, frames: int = 2
) -> tuple[GraphModule, list[Any]]:
    """A graph of ``function(sample (b, 8), timestep, sound (b f, 3, 8), weight, bias)``."""
    torch.manual_seed(0)
    network = Network(function).requires_grad_(False)
    sample, sound = torch.randn(batch, 8), torch.randn(batch * frames, 3, 8)
    gm, inputs = capture(network, sample, torch.tensor(7.0), sound)
    return gm, guide(gm, inputs) if batch % 2 == 0 else inputs

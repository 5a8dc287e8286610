"""From a graph cut into stages to what runs it.

The stages that come before the main graph are a few hundred small operations that run once a chunk
or less: they are run operation by operation, with the bits of the plain module, and cost no time to
compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lsync_compile.graph.dependency import Stage
from lsync_compile.graph.staging import LIMITS, StageGraph, Staging
from lsync_compile.lowering.base import GraphFunction
from lsync_compile.options import Options
from lsync_compile.report import StageRecord
from lsync_compile.runtime.context import Terms
from lsync_compile.runtime.staged import StagedCall, StageFunction


def enabled_stages(options: Options, target: str, terms: Terms) -> frozenset[Stage]:
    """Which stages pay: without a run's chunks, nothing but the weights' could be kept."""
    found = set()
    if options.hoist_weights:
        found.add(Stage.WEIGHTS)
    if target == "unet" and options.hoist_audio and terms.chunks:
        found.add(Stage.CHUNK)
    if target == "unet" and options.hoist_timestep and terms.timesteps:
        found.add(Stage.TIMESTEP)
    return frozenset(found)


def stage_records(staging: Staging) -> list[StageRecord]:
    """One record a stage, for the report."""
    return [
        StageRecord(
            stage.name.lower(),
            graph.operations,
            results=len(graph.results),
            bytes=graph.result_bytes,
        )
        for stage, graph in staging.stages.items()
    ]


def main_inputs(staging: Staging, example_inputs: Sequence[Any]) -> list[Any]:
    """Example inputs of the main graph: those of the captured graph, and empty results."""
    layouts = [value for graph in staging.stages.values() for value in graph.results]
    values = [*example_inputs, *(empty_like(layout, example_inputs) for layout in layouts)]
    return [values[index] for index in staging.main.inputs]


@dataclass(frozen=True)
class MainResults:
    """Which placeholders of the main graph are results of stages, by name.

    Attributes:
        stable: of the weights' stage: they stay where they are until a weight changes.
        kept: of the others: the same values as long as they are the same tensors.
    """

    stable: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()


def main_results(staging: Staging, example_inputs: Sequence[Any]) -> MainResults:
    """The main graph's inputs that stages compute; ``example_inputs`` are the captured graph's."""
    weights = staging.stages.get(Stage.WEIGHTS)
    first = len(example_inputs)  # numbers below are inputs, the weights' results come next
    others = first + (0 if weights is None else len(weights.results))
    names = [node.name for node in staging.main.gm.graph.find_nodes(op="placeholder")]
    numbered = list(zip(names, staging.main.inputs, strict=True))
    return MainResults(
        stable=frozenset(name for name, number in numbered if first <= number < others),
        kept=frozenset(name for name, number in numbered if number >= others),
    )


def staged_call(
    staging: Staging,
    main: GraphFunction,
    records: Sequence[StageRecord],
    count: Callable[..., None],
) -> StagedCall:
    """What runs the captured graph.

    Args:
        staging: the cut graph.
        main: the lowered main graph; takes its placeholders in order.
        records: as :func:`stage_records` made them.
        count: called as ``count(record, computed=…)`` for each use of a stage.
    """
    counters = {record.name: functools.partial(count, record) for record in records}

    def function(stage: Stage) -> StageFunction | None:
        graph = staging.stages.get(stage)
        if graph is None:
            return None
        return StageFunction(
            _in_eager(graph), graph.inputs, graph.results, counters[stage.name.lower()]
        )

    return StagedCall(
        main,
        staging.main.inputs,
        weights=function(Stage.WEIGHTS),
        timestep=function(Stage.TIMESTEP),
        chunk=function(Stage.CHUNK),
        watched_weights=staging.weights,
        watched_chunk=staging.watched.get(Stage.CHUNK, ()),
        table_bytes=LIMITS[Stage.TIMESTEP],
    )


def _in_eager(graph: StageGraph) -> Callable[..., Sequence[Tensor]]:
    forward: Callable[..., Sequence[Tensor]] = graph.gm.forward
    return forward


def empty_like(layout: Tensor, example_inputs: Sequence[Any]) -> Tensor:
    """An example of a value that comes beside these: real, or fake as they are."""
    if any(isinstance(value, FakeTensor) for value in example_inputs):
        return layout
    return torch.empty_strided(
        layout.shape, layout.stride(), dtype=layout.dtype, device=layout.device
    )

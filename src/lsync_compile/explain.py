"""What the backend does with a module, found out without running it.

The module is captured and its graphs go through the passes as they would under ``torch.compile``,
but nothing is lowered: in a graph's place stands a function that returns zeros of the right shapes,
so that a full-size UNet is explained in the time of its capture, on any device that holds it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.fx import GraphModule
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_map

from lsync_compile.backend import Failure, GraphCompiler
from lsync_compile.compiled import attribute_at, is_pipeline
from lsync_compile.errors import OptionError
from lsync_compile.graph.census import Census, census
from lsync_compile.graph.skips import skip_joins
from lsync_compile.lowering.base import GraphFunction
from lsync_compile.options import Options, resolve_options
from lsync_compile.report import (
    GraphRecord,
    Report,
    Session,
    format_deep_cache,
    format_pass,
    format_stage,
)
from lsync_compile.runtime.context import Terms
from lsync_compile.targets import TensorShape, own_call


@dataclass(frozen=True)
class GraphExplanation:
    """One graph: what the passes did and what it is made of.

    Attributes:
        record: the passes, with counts, times and reasons.
        before: census of the graph as captured.
        after: census of the graph after the passes.
        skip_joins: concatenations of a U-shaped network.
    """

    record: GraphRecord
    before: Census
    after: Census
    skip_joins: int


@dataclass(frozen=True)
class Explanation:
    """``str()`` gives the text, :meth:`to_dict` plain values.

    Attributes:
        name: class of the object.
        options: the options in force.
        graphs: all graphs of all explained modules.
        breaks: reasons why a module is more than one graph; empty where it is one.
        notes: fallbacks and remarks about the options.
        seconds: wall time of capture and passes.
    """

    name: str
    options: dict[str, Any]
    graphs: list[GraphExplanation]
    breaks: list[str]
    notes: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``json`` can write."""
        return asdict(self)

    def __str__(self) -> str:
        return format_explanation(self)


def explain(
    obj: Any,
    example_inputs: Any,
    *,
    mode: str | None = None,
    terms: Terms | None = None,
    **options: Any,
) -> Explanation:
    """Say what lsync does with a module or a pipeline, pass by pass, and why not.

    Args:
        obj: an ``nn.Module`` or a pipeline; it is neither run nor changed.
        example_inputs: of a module: its arguments as a tuple or by name as a mapping, or both as
            ``(tuple, mapping)``; of a pipeline: a mapping from "unet", "vae.encoder" and
            "vae.decoder" to those, what is left out is not explained. Shapes, dtypes and devices
            matter, values do not.
        mode: a preset's name.
        terms: what a run says of its UNet calls; nothing by default. With
            ``pipe.example_terms()``, a :class:`LatentSyncPipeline` is explained as it runs.
        **options: see :class:`lsync_compile.Options`.

    Raises:
        OptionError: for a wrong option, or inputs that fit no module of the pipeline.
    """
    preset = "balanced" if is_pipeline(obj) else "exact"
    resolved = resolve_options(mode, options, default_preset=preset)
    return explain_with(obj, example_inputs, resolved, terms)


def explain_with(
    obj: Any, example_inputs: Any, options: Options, terms: Terms | None = None
) -> Explanation:
    """:func:`explain` with checked options."""
    session = Session(type(obj).__name__, options)
    graphs: list[GraphExplanation] = []
    before = dict(counters["graph_break"])
    started = time.perf_counter()
    for role, module, inputs in _modules(obj, example_inputs):
        args, kwargs = _arguments(inputs)
        compiler = _Explainer(session, role, graphs, terms if role == "unet" else None)
        run = torch.compile(own_call(module), backend=compiler, dynamic=False)
        with torch.no_grad():
            run(*args, **kwargs)
    seconds = time.perf_counter() - started
    after = counters["graph_break"]
    breaks = [reason for reason, count in after.items() if count > before.get(reason, 0)]
    report: Report = session.report()
    return Explanation(report.name, report.options, graphs, breaks, report.notes, seconds)


def zeros_like_seen(seen: Any) -> Any:
    """Arguments recorded as :class:`TensorShape`, as tensors."""
    return tree_map(lambda leaf: leaf.zeros() if isinstance(leaf, TensorShape) else leaf, seen)


class _Explainer(GraphCompiler):
    """Runs the passes and takes the census; what it returns computes nothing."""

    def __init__(
        self,
        session: Session,
        target: str,
        graphs: list[GraphExplanation],
        terms: Terms | None,
    ) -> None:
        super().__init__(session, target, terms=terms)
        self._graphs = graphs

    def _compile(
        self, gm: GraphModule, example_inputs: Sequence[Any], record: GraphRecord
    ) -> GraphFunction:
        before = census(gm)
        self._rewrite(gm, record)
        staging = self._stage(gm, record)
        self._deep_cut(gm if staging is None else staging.main.gm, record)
        record.lowering = f"{self.session.options.lowering} (not run)"
        return self._explained(gm, record, before)

    def _fall_back(
        self, untouched: GraphModule, record: GraphRecord, failure: Failure
    ) -> GraphFunction:
        super()._fall_back(untouched, record, failure)
        return self._explained(untouched, record, census(untouched))

    def _explained(self, gm: GraphModule, record: GraphRecord, before: Census) -> GraphFunction:
        joins = len(skip_joins(gm.graph))
        self._graphs.append(GraphExplanation(record, before, census(gm), joins))
        shapes = map_aggregate(gm.graph.output_node().args[0], _shape_of_result)
        return lambda *args: zeros_like_seen(shapes)


def _shape_of_result(value: Any) -> Any:
    if not isinstance(value, torch.fx.Node):
        return value
    example = value.meta["example_value"]
    if not isinstance(example, torch.Tensor):
        return example
    return TensorShape(tuple(example.shape), example.dtype, example.device)


def _modules(obj: Any, example_inputs: Any) -> list[tuple[str, nn.Module, Any]]:
    if isinstance(obj, nn.Module):
        return [("module", obj, example_inputs)]
    if not is_pipeline(obj) or not isinstance(example_inputs, Mapping):
        raise OptionError(
            "explain takes a module and its inputs, or a pipeline and a mapping such as "
            "{'unet': inputs}"
        )
    found = []
    for role, inputs in example_inputs.items():
        module = attribute_at(obj, role)
        if not isinstance(module, nn.Module):
            raise OptionError(f"example_inputs: the pipeline has no module {role!r}")
        found.append((role, module, inputs))
    return found


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if (
        isinstance(inputs, tuple)
        and len(inputs) == 2
        and isinstance(inputs[0], tuple)
        and isinstance(inputs[1], Mapping)
    ):
        return inputs[0], dict(inputs[1])
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def format_explanation(explanation: Explanation) -> str:
    """The explanation as text: for each graph the passes, the costs and the operations."""
    options = explanation.options
    count = len(explanation.graphs)
    lines = [
        f"lsync explain: {explanation.name}, preset {options['preset']}",
        f"  {count} graph{'' if count == 1 else 's'}, {len(explanation.breaks)} graph breaks, "
        f"captured in {explanation.seconds:.1f} s",
        *(f"  break: {reason.splitlines()[0]}" for reason in explanation.breaks),
    ]
    for graph in explanation.graphs:
        record = graph.record
        lines += [
            f"  {record.name} ({record.inputs})",
            f"    {graph.before.nodes} operations -> {graph.after.nodes} after the passes "
            f"({record.pass_seconds:.2f} s), {graph.skip_joins} skip joins, "
            f"{graph.before.flops / 1e9:.2f} GFLOP -> {graph.after.flops / 1e9:.2f}",
            *([f"    not compiled: {record.fallback}"] if record.fallback else []),
            *(f"    pass {format_pass(done)}" for done in record.passes),
            *(f"    {format_stage(stage, ran=False)}" for stage in record.stages),
            *(
                [f"    {format_deep_cache(record.deep_cache, ran=False)}"]
                if record.deep_cache is not None
                else []
            ),
            *([f"    in one piece: {record.unstaged}"] if record.unstaged else []),
        ]
        total = max(graph.after.flops, 1)
        lines += [
            f"    part {part.name}: {part.nodes} operations, {100 * part.flops / total:.1f} % "
            "of FLOPs"
            for part in graph.after.parts
        ]
        common = list(graph.after.ops.items())[:12]
        lines.append("    most frequent: " + ", ".join(f"{name} {n}" for name, n in common))
    lines += [f"  note: {text}" for text in explanation.notes]
    return "\n".join(lines)

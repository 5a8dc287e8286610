"""Runs the passes on one graph: order, switches, times, counts, dumps, checks.

The order is explicit: phases one after the other, inside a phase the registered ``after``
relations, ties by name. Running it records one :class:`PassRecord` for each pass, whether it ran or
not, and raises where a pass leaves a graph that is no longer the same function of the same inputs.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from lsync_compile.graph.build import drop_unused
from lsync_compile.graph.copying import copy_graph
from lsync_compile.graph.results import restore_strides, result_strides
from lsync_compile.options import Options
from lsync_compile.passes import plugins
from lsync_compile.passes.spec import Pass, PassContext, registered, source_uuid
from lsync_compile.report import PassRecord
from lsync_compile.runtime.region import MouthRegion

Interface = tuple[list[str], list[Any]]


class PassError(RuntimeError):
    """A pass broke the graph: it changed the inputs, the outputs or does not lint."""


def ordered(classes: Iterable[type[Pass]]) -> list[type[Pass]]:
    """Topological order by (phase, ``after``), ties by name.

    Raises:
        ValueError: where ``after`` names an unknown pass or one of another phase, or relations
            form a circle.
    """
    waiting = {cls.spec.name: cls for cls in classes}
    phases = {name: cls.spec.phase for name, cls in waiting.items()}
    for name, cls in waiting.items():
        for earlier in cls.spec.after:
            if phases.get(earlier) != phases[name]:
                raise ValueError(f"pass {name!r} comes after {earlier!r}, not a pass of its phase")
    order: list[type[Pass]] = []
    done: set[str] = set()
    while waiting:
        ready = [name for name, cls in waiting.items() if done.issuperset(cls.spec.after)]
        if not ready:
            raise ValueError(f"passes wait for each other: {', '.join(sorted(waiting))}")
        name = min(ready, key=lambda name: (phases[name], name))
        order.append(waiting.pop(name))
        done.add(name)
    return sorted(order, key=lambda cls: cls.spec.phase)


class PassManager:
    """The passes of one set of options, in order.

    Args:
        options: switches passes and says where dumps go.
        classes: the passes; all registered ones and those of other distributions by default.

    Raises:
        PluginError: a pass of another distribution cannot be used, and ``strict`` is set.
    """

    def __init__(self, options: Options, classes: Iterable[type[Pass]] | None = None) -> None:
        self.options = options
        if classes is None:
            self._selection = plugins.select(options, ordered(registered().values()))
        else:
            self._selection = plugins.Selection(ordered(classes))
        self.passes = [cls() for cls in self._selection.order]

    def uuid(self) -> str:
        """Key of what these passes do: sources of all they use, order, options, torch's version.

        For caches of compiled code that do not see the graph before the passes.
        """
        digest = hashlib.sha256(torch.__version__.encode())
        digest.update(json.dumps(self.options.to_dict(), sort_keys=True, default=repr).encode())
        for each in self.passes:
            plugin = self._selection.plugins.get(each.spec.name)
            key = source_uuid(type(each)) if plugin is None else plugin.uuid
            digest.update(f"{each.spec.name}:{key}".encode())
        return digest.hexdigest()

    @property
    def problems(self) -> list[str]:
        """A line for each pass of another distribution that cannot be used."""
        return [plugin.problem for plugin in self._selection.broken]

    def run(
        self,
        gm: GraphModule,
        target: str,
        name: str,
        vouched: frozenset[str] = frozenset(),
        region: MouthRegion | None = None,
    ) -> list[PassRecord]:
        """Rewrite ``gm`` in place; its results keep their strides.

        Args:
            gm: a graph as dynamo captured it.
            target: its role, see :class:`PassContext`.
            name: names the folder of its dumps.
            vouched: what holds for the graph's inputs, see :class:`PassContext`.
            region: the part of the picture that matters, see :class:`PassContext`.

        Raises:
            PassError: where a pass left a broken graph.
            PluginError: where one of another distribution failed, and ``strict`` is set.
        """
        context = PassContext(self.options, target, vouched, region)
        strides = result_strides(gm.graph)
        records = [
            self._run_one(index, each, gm, context, name) for index, each in enumerate(self.passes)
        ]
        if restore_strides(gm.graph, strides):
            gm.recompile()
        for off in self._selection.skipped:
            reason, whose = f"option {off.name}", off.distribution
            records.append(PassRecord(off.name, "", "off", reason=reason, distribution=whose))
        return records

    def _run_one(
        self, index: int, each: Pass, gm: GraphModule, context: PassContext, name: str
    ) -> PassRecord:
        spec = each.spec
        nodes = len(gm.graph.nodes)
        record = PassRecord(
            spec.name, spec.phase.name.lower(), "no match", nodes_before=nodes, nodes_after=nodes
        )
        plugin = self._selection.plugins.get(spec.name)
        if plugin is None:
            on = getattr(self.options, spec.option)
        else:
            on, record.distribution = plugins.switched_on(self.options, spec), plugin.distribution
        if not on:
            record.outcome, record.reason = "off", f"option {spec.option}"
        elif plugin is None:
            self._apply(index, each, gm, context, name, record)
        else:
            self._try(index, each, gm, context, name, record)
        return record

    def _try(
        self,
        index: int,
        each: Pass,
        gm: GraphModule,
        context: PassContext,
        name: str,
        record: PassRecord,
    ) -> None:
        """Run a pass of another distribution on a copy; the graph is as before where it fails."""
        before, trial = gm.graph, copy_graph(gm)
        try:
            self._apply(index, each, trial, context, name, record)
            if record.matches:
                gm.graph = trial.graph
                gm.graph.lint()
        except Exception as error:  # another's code may raise anything
            reason = plugins.described(error)
            if self.options.strict:
                whose = f"pass {record.name!r} of {record.distribution}"
                raise plugins.PluginError(f"{whose} failed: {reason}") from error
            gm.graph = before
            record.outcome, record.reason = "failed", reason
            record.matches, record.nodes_after = 0, len(gm.graph.nodes)

    def _apply(
        self,
        index: int,
        each: Pass,
        gm: GraphModule,
        context: PassContext,
        name: str,
        record: PassRecord,
    ) -> None:
        """Run a pass where it fits, and write down what came of it."""
        spec = each.spec
        if spec.targets and context.target not in spec.targets:
            record.outcome = "not for this graph"
            record.reason = f"only {', '.join(spec.targets)}"
            return
        record.reason = each.veto(gm, context)
        if record.reason:
            record.outcome = "vetoed"
            return
        dump = self._dumper(f"{record.phase}.{index}.{spec.name}", name)
        dump("before", gm)
        interface = _interface(gm.graph)
        started = time.perf_counter()
        record.matches = each.rewrite(gm, context)
        if record.matches:
            record.outcome = "applied"
            _settle(gm, spec.name, interface)
        record.seconds = time.perf_counter() - started
        record.nodes_after = len(gm.graph.nodes)
        dump("after", gm)

    def _dumper(self, stem: str, name: str) -> Any:
        if self.options.dump_dir is None:
            return lambda stage, gm: None
        folder = self.options.dump_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        return lambda stage, gm: _write(folder / f"{stem}.{stage}.py", gm)


def _write(path: Path, gm: GraphModule) -> None:
    path.write_text(gm.print_readable(print_output=False))


def _settle(gm: GraphModule, name: str, before: Interface) -> None:
    """Drop what the rewrite left unused, check the graph and regenerate its code."""
    drop_unused(gm.graph)
    gm.graph.lint()
    after = _interface(gm.graph)
    if after[0] != before[0]:
        raise PassError(f"pass {name!r} changed the graph's inputs")
    if after[1] != before[1]:
        raise PassError(f"pass {name!r} changed the number, shape or dtype of the graph's outputs")
    gm.recompile()


def _interface(graph: Graph) -> Interface:
    """Names of the inputs; shape and dtype, or the plain value, of each output."""
    inputs = [node.name for node in graph.nodes if node.op == "placeholder"]
    outputs: list[Any] = []

    def note(value: Any) -> Any:
        outputs.append(
            _described(value.meta.get("example_value")) if isinstance(value, Node) else value
        )
        return value

    torch.fx.node.map_aggregate(graph.output_node().args, note)
    return inputs, outputs


def _described(example: Any) -> Any:
    if isinstance(example, torch.Tensor):
        return tuple(example.shape), example.dtype
    return type(example)

"""What was compiled, what was done to it and what it was used for: data first, then text.

A :class:`Session` belongs to one compiled object (a pipeline, a module or a function) and gathers
records while it works; :meth:`Session.report` copies them into a :class:`Report`, which prints as
text and converts to plain values for JSON.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lsync_compile.options import Options, left_out
from lsync_compile.records import (
    CaptureRecord,
    DeepCacheRecord,
    GraphRecord,
    Kind,
    Outcome,
    PassRecord,
    StageRecord,
    TimeRecord,
)
from lsync_compile.runtime.calibration import Calibration
from lsync_compile.runtime.memory import MemoryPools, readable

__all__ = [
    "CaptureRecord",
    "DeepCacheRecord",
    "GraphRecord",
    "Kind",
    "Outcome",
    "PassRecord",
    "Report",
    "Session",
    "StageRecord",
    "TimeRecord",
    "format_capture",
    "format_deep_cache",
    "format_feature",
    "format_pass",
    "format_report",
    "format_stage",
    "format_time",
]


@dataclass
class Report:
    """A snapshot of a session; ``str()`` gives the text, :meth:`to_dict` plain values.

    Attributes:
        features: what each optimisation of the runtime counted, by name.
        times: wall time by kind of work, in the order of a chunk's way.
    """

    name: str
    options: dict[str, Any]
    graphs: list[GraphRecord]
    notes: list[str]
    runs: int
    features: dict[str, dict[str, float]] = field(default_factory=dict)
    times: dict[str, TimeRecord] = field(default_factory=dict)

    @property
    def counters(self) -> dict[str, int]:
        """Totals over all graphs; ``recompiles`` leaves out the variants, which are wanted."""
        frames = {(graph.target, graph.frame) for graph in self.graphs}
        return {
            "runs": self.runs,
            "graphs": len(self.graphs),
            "variants": sum(graph.kind == "variant" for graph in self.graphs),
            "recompiles": sum(graph.kind == "recompile" for graph in self.graphs),
            "breaks": len(frames) - len({target for target, _ in frames}),
            "fallbacks": sum(bool(graph.fallback) for graph in self.graphs),
            "cache_hits": sum(graph.cache_hit for graph in self.graphs),
            "captured": sum(
                graph.capture is not None and graph.capture.state == "captured"
                for graph in self.graphs
            ),
            "calls": sum(graph.calls for graph in self.graphs),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``json`` can write."""
        return {**asdict(self), "counters": self.counters}

    def __str__(self) -> str:
        return format_report(self)


class Session:
    """The records of one compiled object. Safe to use from several threads.

    Args:
        name: what the report calls the object.
        options: its options; exchanged by the hook when only non-rebuild options change.

    Attributes:
        memory: the static memory of its captured graphs.
        calibrations: schedules measured for its UNet, where the options ask for them.
    """

    def __init__(self, name: str, options: Options) -> None:
        self.name = name
        self.options = options
        self.memory = MemoryPools()
        self.calibrations: Mapping[tuple[int, int, str], Calibration] = {}
        self.lock = threading.Lock()
        self._graphs: list[GraphRecord] = []
        self._notes: list[str] = []
        self._runs = 0
        self._features: dict[str, dict[str, float]] = {}
        self._times: dict[str, TimeRecord] = {}

    def add_graph(self, record: GraphRecord) -> None:
        with self.lock:
            self._graphs.append(record)

    def count_graphs(self, target: str) -> int:
        """How many graphs of a target are on record: the number of the next one."""
        with self.lock:
            return sum(graph.target == target for graph in self._graphs)

    def count_call(self, record: GraphRecord) -> None:
        with self.lock:
            record.calls += 1

    def count_stage(self, record: StageRecord, *, computed: bool) -> None:
        with self.lock:
            if computed:
                record.computed += 1
            else:
                record.reused += 1

    def count_deep_cache(self, record: DeepCacheRecord, event: str) -> None:
        """Add one to the counter of this name."""
        with self.lock:
            setattr(record, event, getattr(record, event) + 1)

    def count_run(self) -> None:
        with self.lock:
            self._runs += 1

    def count(self, feature: str, **numbers: float) -> None:
        """Add to the counters of an optimisation of the runtime; zero makes them show."""
        with self.lock:
            counters = self._features.setdefault(feature, {})
            for name, number in numbers.items():
                counters[name] = counters.get(name, 0) + number

    def most(self, feature: str, **numbers: float) -> None:
        """Keep the largest of what a counter was given so far, such as an error or bytes."""
        with self.lock:
            counters = self._features.setdefault(feature, {})
            for name, number in numbers.items():
                counters[name] = max(counters.get(name, number), number)

    def least(self, feature: str, **numbers: float) -> None:
        """Keep the smallest of what a counter was given so far, such as a PSNR."""
        with self.lock:
            counters = self._features.setdefault(feature, {})
            for name, number in numbers.items():
                counters[name] = min(counters.get(name, number), number)

    def time(self, work: str, seconds: float) -> None:
        """Add the wall time of one piece of work of a run."""
        with self.lock:
            record = self._times.setdefault(work, TimeRecord())
            record.calls += 1
            record.seconds += seconds

    def note(self, text: str) -> bool:
        """Add a line to the report; False where it stands there already."""
        with self.lock:
            if text in self._notes:
                return False
            self._notes.append(text)
            return True

    def report(self) -> Report:
        with self.lock:
            graphs, notes, runs = copy.deepcopy(self._graphs), list(self._notes), self._runs
            features, times = copy.deepcopy(self._features), copy.deepcopy(self._times)
        return Report(
            name=self.name,
            options=self.options.to_dict(),
            graphs=graphs,
            notes=[
                *left_out(self.options),
                *notes,
                *_idle_caches(graphs),
            ],
            runs=runs,
            features=features,
            times=times,
        )


def _idle_caches(graphs: list[GraphRecord]) -> list[str]:
    """A line for each cache that was there and did nothing."""
    return [
        f"{graph.name}: deep_cache never reused anything in {_count(cache.computed, 'call')}; "
        "the runtime says no steps, or the schedule computes all of them"
        for graph in graphs
        if (cache := graph.deep_cache) is not None
        and not cache.reason
        and cache.computed > 1
        and not cache.reused
    ]


def format_report(report: Report) -> str:
    """The report as text, one line a graph and one a pass that did something."""
    options = report.options
    total = report.counters
    lines = [
        f"lsync report: {report.name}, preset {options['preset']}, lowering {options['lowering']}",
        f"  {_count(total['runs'], 'run')}, {_count(total['graphs'], 'graph')} compiled "
        f"({total['variants']} for other shapes, {total['cache_hits']} from cache), "
        f"{_count(total['calls'], 'graph call')}",
        f"  recompiles {total['recompiles']}, graph breaks {total['breaks']}, "
        f"eager fallbacks {total['fallbacks']}",
    ]
    for graph in report.graphs:
        lines.append(
            f"  {graph.name} ({graph.kind}; {graph.inputs}): nodes {graph.nodes_in} -> "
            f"{graph.nodes_out}, {_preparation(graph)}, {graph.lowering} "
            f"{graph.lowering_seconds:.2f} s, {_count(graph.calls, 'call')}"
        )
        lines.extend(f"    {format_pass(done)}" for done in graph.passes)
        lines.extend(f"    {format_stage(stage)}" for stage in graph.stages)
        if graph.deep_cache is not None:
            lines.append(f"    {format_deep_cache(graph.deep_cache)}")
        if graph.unstaged:
            lines.append(f"    in one piece: {graph.unstaged}")
        if graph.capture is not None:
            lines.append(f"    CUDA graph: {format_capture(graph.capture)}")
        if graph.fallback:
            lines.append(f"    not compiled: {graph.fallback}")
    lines.extend(f"  {name}: {format_feature(counts)}" for name, counts in report.features.items())
    lines.extend(f"  time: {name} {format_time(spent)}" for name, spent in report.times.items())
    lines.extend(f"  note: {text}" for text in report.notes)
    return "\n".join(lines)


def _preparation(graph: GraphRecord) -> str:
    if graph.kept:
        return "captured before"
    return f"passes {graph.pass_seconds:.2f} s"


def format_pass(record: PassRecord) -> str:
    """One line: what a pass did, or why it did nothing."""
    name = f"{record.name} ({record.distribution})" if record.distribution else record.name
    if record.outcome == "applied":
        return (
            f"{name}: {_count(record.matches, 'match', 'matches')}, nodes "
            f"{record.nodes_before} -> {record.nodes_after}, {1000 * record.seconds:.0f} ms"
        )
    if record.outcome == "no match":
        return f"{name}: no match, {1000 * record.seconds:.0f} ms"
    return f"{name}: {record.outcome} ({record.reason})"


def format_capture(record: CaptureRecord) -> str:
    """One line: what is replayed and the memory it takes, or why nothing is."""
    if record.state != "captured":
        return "not called yet" if record.state == "waiting" else f"none ({record.reason})"
    again = f", captured {record.captures} times" if record.captures > 1 else ""
    return (
        f"{_count(record.replays, 'replay')}{again}; memory {readable(record.planned_bytes)} "
        f"planned ({readable(record.summed_bytes)} without reuse), "
        f"{readable(record.pool_bytes)} in its pool, inputs {readable(record.static_bytes)}; "
        f"{record.seconds:.2f} s"
    )


def format_deep_cache(record: DeepCacheRecord, *, ran: bool = True) -> str:
    """One line: how much of the graph is spared and, where it ran, how often."""
    if record.reason:
        return f"deep cache: none ({record.reason})"
    line = (
        f"deep cache: branch {record.branch}, {record.shallow_operations} of "
        f"{_count(record.operations, 'operation')} without deep features "
        f"({readable(record.bytes)})"
    )
    if not ran:
        return line
    line += f", computed {record.computed}, reused {record.reused}"
    if record.unlike:
        line += f", {record.unlike} computed for lack of similarity"
    capture = record.capture
    return line if capture is None else f"{line}; CUDA graph: {format_capture(capture)}"


def format_stage(record: StageRecord, *, ran: bool = True) -> str:
    """One line: what a stage holds and, where it ran, how often it was spared."""
    line = (
        f"stage {record.name}: {_count(record.operations, 'operation')}, "
        f"{_count(record.results, 'result')} ({record.bytes / 2**20:.1f} MiB)"
    )
    return f"{line}, computed {record.computed}, reused {record.reused}" if ran else line


def format_feature(counters: dict[str, float]) -> str:
    """One line: what an optimisation counted; names ending in ``bytes`` are sizes."""
    parts = []
    for name, number in counters.items():
        size = name.endswith("bytes")
        label = name.replace("_", " ")
        parts.append(f"{label} {readable(int(number)) if size else f'{number:.4g}'}")
    return ", ".join(parts)


def format_time(record: TimeRecord) -> str:
    """Sum and mean of the wall time of one kind of work."""
    mean = 1000 * record.seconds / max(1, record.calls)
    return f"{record.seconds:.2f} s in {_count(record.calls, 'call')} ({mean:.1f} ms each)"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"

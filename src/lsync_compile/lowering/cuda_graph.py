"""Runs a lowered graph as one CUDA graph: recorded once, replayed with a single launch.

A replay repeats the recorded kernels on the recorded addresses, so each kind of input has its rule:

- **weights** are read where they lie. A call that finds one elsewhere records anew; new values at
  the same address are seen by the next replay.
- **other inputs** are copied into static memory, unless they lie there already. Those named
  ``kept`` are copied only when another tensor comes than last time.

Results are copied out into memory of the caller's own, since the next replay of any graph of the
pool overwrites them where they are; they may be kept as long as those of a plain call.

The first call warms up: it runs the graph on the side stream it will be recorded on, which loads
and tunes kernels and makes library handles, none of which a recording allows. Nothing in a later
call waits for the device or allocates from it.

What a recording cannot express runs as it was lowered, and the report says why. What the graph
shows is found beforehand (:mod:`lsync_compile.lowering.capturable`), the rest by warming up and
recording.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from lsync_compile.graph.dependency import is_weight
from lsync_compile.graph.liveness import lifetimes
from lsync_compile.lowering.base import GraphFunction
from lsync_compile.lowering.capturable import device_of, why_not
from lsync_compile.lowering.recording import RefusalError, record
from lsync_compile.report import CaptureRecord, GraphRecord, Session
from lsync_compile.runtime.memory import BatchAwareMemoryPool, Lease, plan, readable, span
from lsync_compile.runtime.running import options_of

log = logging.getLogger(__name__)

MOST_CAPTURES = 8  # a graph whose weights keep moving is recorded no more often


@dataclass(frozen=True)
class Inputs:
    """How a graph's inputs reach its recording, by their place; unused ones are in none of these.

    Attributes:
        names: of all placeholders.
        read: weights, read where they lie.
        copied: copied to static memory.
        kept: of those copied, the ones that have the same values whenever they are the same
            tensors: what the caller computed once for several calls.
    """

    names: tuple[str, ...]
    read: tuple[int, ...]
    copied: tuple[int, ...]
    kept: frozenset[int] = frozenset()

    @classmethod
    def of(cls, gm: GraphModule, kept: Collection[str], stable: Collection[str]) -> Inputs:
        """By the placeholders; parameters, buffers and those named in ``stable`` are weights."""
        nodes = gm.graph.find_nodes(op="placeholder")
        used = [(index, node) for index, node in enumerate(nodes) if node.users]
        read = tuple(i for i, node in used if node.name in stable or is_weight(node))
        return cls(
            names=tuple(node.name for node in nodes),
            read=read,
            copied=tuple(i for i, _ in used if i not in set(read)),
            kept=frozenset(i for i, node in used if node.name in kept),
        )


def capturing(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    session: Session,
    graph_record: GraphRecord,
    *,
    kept: Collection[str] = (),
    stable: Collection[str] = (),
) -> Callable[[GraphFunction], GraphFunction]:
    """What makes a captured call of the graph once it is lowered.

    To be had before lowering, which may change the graph.

    Args:
        gm: the graph that is going to be lowered.
        example_inputs: one for each placeholder.
        session: its options decide; its pools give the memory.
        graph_record: gets a :class:`CaptureRecord` where the graph is on a device with CUDA graphs.
        kept: see :class:`Inputs`, by name.
        stable: names of placeholders that are weights to the caller.
    """
    options, device = options_of(session), device_of(example_inputs)
    if device is None or not options.cuda_graphs:
        return lambda call: call
    reason = why_not(gm, example_inputs)
    if options.inductor.get("triton.cudagraphs"):
        reason = "Inductor makes CUDA graphs itself: option inductor, triton.cudagraphs"
    if reason:
        graph_record.capture = CaptureRecord(state="refused", reason=reason)
        return lambda call: call
    scratch = plan(lifetimes(gm.graph))
    outcome = CaptureRecord(planned_bytes=scratch.size, summed_bytes=scratch.summed)
    inputs = Inputs.of(gm, kept, stable)
    pool = session.memory.get(graph_record.target.partition(".")[0], device, torch.cuda)

    def refused(reason: str) -> None:
        if session.note(f"{graph_record.target} is not captured as a CUDA graph: {reason}"):
            log.warning("%s is not captured as a CUDA graph: %s", graph_record.name, reason)

    def captured(call: GraphFunction) -> GraphFunction:
        graph_record.capture = outcome
        return CapturedCall(call, inputs, pool, outcome, refused=refused)

    return captured


@dataclass(frozen=True)
class _Recording:
    """What replays: the CUDA graph, its results and the weights' addresses it reads."""

    graph: Any
    outputs: tuple[Any, ...]
    addresses: list[int]


class CapturedCall:
    """A lowered graph that is recorded in its first call and replayed from then on.

    Args:
        call: the lowered graph, a function of its placeholders in order.
        inputs: what the placeholders are.
        pool: static memory, shared with graphs that never run at the same time.
        record: filled in as calls come; its planned bytes are what must be free to begin with.
        refused: called with the reason when it turns out that the graph cannot be captured.
        cuda: the module :mod:`torch.cuda`, or one with its names.
    """

    def __init__(
        self,
        call: GraphFunction,
        inputs: Inputs,
        pool: BatchAwareMemoryPool,
        record: CaptureRecord,
        *,
        refused: Callable[[str], object] = lambda reason: None,
        cuda: Any = torch.cuda,
    ) -> None:
        self._call = call
        self._inputs = inputs
        self._pool = pool
        self._record = record
        self._on_refusal = refused
        self._cuda = cuda
        self._plain = False
        self._first = threading.Lock()
        self._lease: Lease | None = None
        self._static: dict[int, Tensor] = {}
        self._sources: dict[int, weakref.ref[Tensor]] = {}
        self._recording: _Recording | None = None
        pool.join(self)

    def __call__(self, *args: Any) -> Any:
        """The graph's outputs, in memory of the caller's own; arguments are the placeholders'."""
        if self._plain or self._cuda.is_current_stream_capturing():  # part of a larger recording
            return self._call(*args)
        with self._cuda.device(self._pool.device):
            outputs = self._replayed(args)
        return self._call(*args) if outputs is None else outputs

    def _replayed(self, args: Sequence[Any]) -> tuple[Any, ...] | None:
        """The outputs of a replay; ``None`` where the graph cannot be captured."""
        with self._first:
            if self._lease is None and not self._plain:
                try:
                    self._lease = self._static_memory(args)
                except RefusalError as refusal:
                    self._give_up(str(refusal))
            lease = self._lease
        if lease is None:
            return None
        with self._pool.turn(lease) as untouched:
            if self._plain or self._lease is not lease:  # refused or released meanwhile
                return None
            try:
                self._fill(args, untouched)
                addresses = [args[index].data_ptr() for index in self._inputs.read]
                if self._recording is None or self._recording.addresses != addresses:
                    self._recording = None  # gives its scratch back first
                    self._recording = self._record_anew(args, addresses)
            except RefusalError as refusal:
                self._give_up(str(refusal))
                return None
            self._recording.graph.replay()
            self._record.replays += 1
            return _own(self._recording.outputs)

    def _static_memory(self, args: Sequence[Any]) -> Lease:
        """Lease memory for the inputs that are copied, and lay tensors in it.

        Raises:
            RefusalError: where there is too little, or an input overlaps itself.
        """
        for index in self._inputs.copied:
            if _overlaps(_distinct(args[index])):
                raise RefusalError(f"input {self._inputs.names[index]} overlaps itself")
        sizes = [span(args[index]) for index in self._inputs.copied]
        needed, available = self._record.planned_bytes + sum(sizes), self._pool.available_bytes()
        if available is not None and needed > available:
            raise RefusalError(
                f"memory is short: {readable(needed)} planned, {readable(available)} free"
            )
        try:
            lease = self._pool.lease(sizes)
        except torch.OutOfMemoryError:
            raise RefusalError("memory is short: no room for its inputs") from None
        self._static = {
            index: lease.tensor(number, args[index])
            for number, index in enumerate(self._inputs.copied)
        }
        self._record.static_bytes = lease.size
        return lease

    def _fill(self, args: Sequence[Any], untouched: bool) -> None:
        """Copy to static memory what does not lie there already."""
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for index, static in self._static.items():
            source = args[index]
            if source.data_ptr() == static.data_ptr():
                continue
            if index in self._inputs.kept:
                known = self._sources.get(index)
                if untouched and known is not None and known() is source:
                    continue
                self._sources[index] = weakref.ref(source)
            targets.append(_distinct(static))
            sources.append(_distinct(source))
        if targets:
            with torch.no_grad():
                torch._foreach_copy_(targets, sources)

    def _record_anew(self, args: Sequence[Any], addresses: list[int]) -> _Recording:
        """The caller has the pool's turn, and the static memory is filled.

        Raises:
            RefusalError: see :func:`lsync_compile.lowering.recording.record`.
        """
        if self._record.captures == MOST_CAPTURES:
            raise RefusalError(f"its weights moved after each of {MOST_CAPTURES} captures")
        started = time.perf_counter()
        inputs = [self._static.get(index, value) for index, value in enumerate(args)]
        graph, outputs = record(self._call, inputs, self._pool, self._cuda)
        done = self._record
        done.state, done.captures = "captured", done.captures + 1
        done.pool_bytes = self._pool.scratch_bytes()
        done.seconds += time.perf_counter() - started
        return _Recording(graph, outputs, addresses)

    def release(self) -> None:
        """Give all memory back; another call would begin as the first one did."""
        with self._first, self._pool.alone():
            self._drop()

    def _drop(self) -> None:
        self._lease, self._recording = None, None
        self._static.clear()
        self._sources.clear()

    def _give_up(self, reason: str) -> None:
        """Run plain from now on; memory goes back to its pool."""
        self._plain = True
        self._drop()
        self._record.state, self._record.reason = "refused", reason
        self._record.static_bytes = 0
        self._on_refusal(reason)


def _own(outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of the tensors; one that is there twice stays one."""
    copies: dict[int, Any] = {}
    for output in outputs:
        if id(output) not in copies:
            copies[id(output)] = output.clone() if isinstance(output, Tensor) else output
    return tuple(copies[id(output)] for output in outputs)


def _distinct(tensor: Tensor) -> Tensor:
    """The tensor without its repetitions: expanded dimensions cut to one."""
    for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements of a tensor may share memory."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach += (size - 1) * stride
    return False

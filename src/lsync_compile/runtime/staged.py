"""Runs a graph that was cut into stages, each stage only when its values are new.

What the weights give is kept until a weight changes or a new run begins, what a timestep gives in a
small table, what the sound gives for its chunk. All of it belongs to the one compiled graph that
holds this object, and goes with it.
"""

from __future__ import annotations

import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor

from lsync_compile.runtime.context import StepContext, current

Results = tuple[Tensor, ...]
RUNS = 4  # runs under way at the same time whose values are kept


class StageCounter(Protocol):
    """Told each time: was the stage computed, or its last results used again?"""

    def __call__(self, *, computed: bool) -> None: ...


@dataclass(frozen=True)
class StageFunction:
    """A stage ready to run.

    Attributes:
        call: takes its inputs in order and returns its results as a tuple.
        inputs: which values it takes: the call's arguments are counted from 0, the results of all
            stages go on from there, the weights' stage first.
        layouts: example values of the results.
        count: told of each use.
    """

    call: Callable[..., Sequence[Tensor]]
    inputs: tuple[int, ...]
    layouts: tuple[Tensor, ...]
    count: StageCounter


class Watch:
    """Recognises the tensors it was made of while nothing was written into them.

    A tensor that autograd does not version (made under ``inference_mode``) counts as unwritten. So
    do writes through ``tensor.data``, which autograd does not see.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._seen = [(ref(t), version_of(t), t.data_ptr()) for t in tensors]

    def holds(self, tensors: Iterable[Tensor]) -> bool:
        """Whether these are the same tensors with the same contents."""
        return all(
            known() is tensor
            and (version is None or tensor._version == version)
            and tensor.data_ptr() == address
            for (known, version, address), tensor in zip(self._seen, tensors, strict=True)
        )


@dataclass
class _Chunk:
    """The results of the chunk's stage in one run."""

    number: int
    watch: Watch
    results: Results


@dataclass
class _Kept:
    """All that is kept, valid for one state of the weights."""

    watch: Watch
    weights: Results
    runs: list[Hashable] = field(default_factory=list)  # that began with these weights, last last
    timesteps: OrderedDict[float, Results] = field(default_factory=OrderedDict)
    chunks: OrderedDict[Hashable, _Chunk] = field(default_factory=OrderedDict)


class StagedCall:
    """A graph function that computes what it can once.

    Results are recomputed

    - of the weights, where a weight is another tensor or was written to, and in each new run:
      writes through ``.data`` are seen then;
    - of a timestep, where the context's ``timestep`` is unknown or not among the last ones;
    - of a chunk, where the context says another chunk or run, or the tensors watched are others;
    - all but the weights', without a context.

    A stage that fails leaves nothing behind. Several threads may call it: they never see each
    other's chunk.

    Args:
        main: computes the result from ``main_inputs``, numbered as :attr:`StageFunction.inputs`.
        weights, timestep, chunk: the stages; None where there is nothing to compute.
        watched_weights: which arguments are weights that any stage looks at.
        watched_chunk: which other arguments the chunk's stage looks at and must be the same.
        table_bytes: what the results of all timesteps that are kept may take together.
    """

    def __init__(
        self,
        main: Callable[..., Any],
        main_inputs: tuple[int, ...],
        *,
        weights: StageFunction | None,
        timestep: StageFunction | None,
        chunk: StageFunction | None,
        watched_weights: tuple[int, ...],
        watched_chunk: tuple[int, ...],
        table_bytes: int,
    ) -> None:
        self._main = main
        self._main_inputs = _picker(main_inputs)
        self._weights = weights
        self._timestep = timestep
        self._chunk = chunk
        self._watched_weights = _picker(watched_weights)
        self._watched_chunk = _picker(watched_chunk)
        self._entries = 0 if timestep is None else _entries(timestep, table_bytes)
        self._kept: _Kept | None = None
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        """The captured graph's outputs for its inputs in order."""
        context = current()
        kept = self._settled(args, context)
        values = (*args, *kept.weights)
        timestep = self._of_timestep(kept, values, context)
        chunk = self._of_chunk(kept, args, values, context)
        result = self._main(*self._main_inputs((*values, *timestep, *chunk)))
        if context is not None and context.step == context.steps - 1:
            with self._lock:
                kept.chunks.pop(context.run, None)
        return result

    def forget(self) -> None:
        """Drop all that is kept; the next call computes it anew."""
        self._kept = None

    def _settled(self, args: tuple[Any, ...], context: StepContext | None) -> _Kept:
        """What is kept for these weights, made anew where they changed."""
        kept, watched = self._kept, self._watched_weights(args)
        known = kept is not None and (context is None or context.run in kept.runs)
        if kept is not None and known and kept.watch.holds(watched):
            if self._weights is not None:
                self._weights.count(computed=False)
            return kept
        runs = [] if kept is None else kept.runs
        held = kept.weights if kept is not None and kept.watch.holds(watched) else ()
        kept = self._kept = None  # results of other weights go before the new ones come
        made = _Kept(Watch(watched), _at_home(_run(self._weights, args), held))
        if context is not None:
            made.runs = [*runs, context.run][-RUNS:]
        self._kept = made
        return made

    def _of_timestep(
        self, kept: _Kept, values: tuple[Any, ...], context: StepContext | None
    ) -> Results:
        stage = self._timestep
        if stage is None:
            return ()
        key = None if context is None else context.timestep
        with self._lock:
            known = None if key is None else kept.timesteps.get(key)
            if known is not None and key is not None:
                kept.timesteps.move_to_end(key)
        if known is not None:
            stage.count(computed=False)
            return known
        results = _run(stage, values)
        if key is not None:
            with self._lock:
                kept.timesteps[key] = results
                while len(kept.timesteps) > self._entries:
                    kept.timesteps.popitem(last=False)
        return results

    def _of_chunk(
        self,
        kept: _Kept,
        args: tuple[Any, ...],
        values: tuple[Any, ...],
        context: StepContext | None,
    ) -> Results:
        stage = self._chunk
        if stage is None:
            return ()
        watched = self._watched_chunk(args)
        known = None if context is None else kept.chunks.get(context.run)
        if (
            known is not None
            and context is not None
            and known.number == context.chunk
            and known.watch.holds(watched)
        ):
            stage.count(computed=False)
            return known.results
        watch = Watch(watched)
        results = _run(stage, values)
        if context is not None:
            with self._lock:
                kept.chunks[context.run] = _Chunk(context.chunk, watch, results)
                kept.chunks.move_to_end(context.run)
                while len(kept.chunks) > RUNS:
                    kept.chunks.popitem(last=False)
        return results


def _run(stage: StageFunction | None, values: Sequence[Any]) -> Results:
    if stage is None:
        return ()
    stage.count(computed=True)
    results = stage.call(*_picker(stage.inputs)(values))
    return tuple(map(as_planned, results, stage.layouts))


def _at_home(results: Results, held: Results) -> Results:
    """Results of the same weights in the memory of the last ones, whose addresses are known."""
    modes = torch.is_inference_mode_enabled(), any(value.is_inference() for value in held)
    if not held or modes == (False, True):  # which torch does not let anyone write to
        return results
    pairs = [(h, r) for h, r in zip(held, results, strict=True) if h.data_ptr() != r.data_ptr()]
    if pairs:
        with torch.no_grad():
            torch._foreach_copy_([home for home, _ in pairs], [new for _, new in pairs])
    return held


def as_planned(result: Tensor, layout: Tensor) -> Tensor:
    """The main graph is compiled for these strides; a kernel may have chosen others."""
    if result.stride() == layout.stride():
        return result
    planned = torch.empty_strided(
        layout.shape, layout.stride(), dtype=result.dtype, device=result.device
    )
    return planned.copy_(result)


def _entries(stage: StageFunction, limit: int) -> int:
    size = sum(value.numel() * value.element_size() for value in stage.layouts)
    return max(1, limit // max(size, 1))


def _picker(indices: tuple[int, ...]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """``values -> tuple of values[i]``; itemgetter alone gives one value bare."""
    if len(indices) < 2:
        return lambda values: tuple(values[index] for index in indices)
    return operator.itemgetter(*indices)


def version_of(tensor: Tensor) -> int | None:
    """How often autograd saw the tensor written to; None where it does not count."""
    return None if tensor.is_inference() else tensor._version

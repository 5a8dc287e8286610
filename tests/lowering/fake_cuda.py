"""A stand-in for ``torch.cuda`` with graphs of CPU tensors, as unforgiving as the real ones.

A recording notes the operators that run and the memory they use, and computes nothing: what it
returns is NaN until a replay. A replay computes the noted operators on the noted memory, whatever
tensors stand there by then, and first destroys what all other graphs of its pool have left, as
graphs that share memory may. Reading a number back while recording is an error that spoils the
recording, and ending it then is another error.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FORBIDDEN = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Stream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self._cuda = cuda
        self.name = name

    def wait_stream(self, other: Stream) -> None:
        self._cuda.log.append(f"{self.name} waits for {other.name}")


class Generator:
    """A CUDA generator's position; ``stuck`` where it believes that a recording goes on."""

    def __init__(self) -> None:
        self.offset = 0
        self.stuck = False

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        self.offset = offset


class CUDAGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self._steps: list[tuple[Any, Any, Any, Any]] = []
        self._pool: tuple[int, int] | None = None
        self.ended = False

    def pool(self) -> tuple[int, int]:
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        assert self._pool is not None
        return self._pool

    @torch.inference_mode()  # a device does not know how its memory was made
    def replay(self) -> None:
        assert self.ended
        self._cuda.log.append(f"replay on {self._cuda.current_stream().name}")
        for other in self._cuda.graphs:
            if other is not self and other._pool == self._pool:
                other.destroy()
        for func, args, kwargs, results in self._steps:
            computed = func(*args, **kwargs)
            if func._schema.is_mutable:
                continue
            for target, value in zip(tree_leaves(results), tree_leaves(computed), strict=True):
                if isinstance(target, Tensor) and target.data_ptr() != value.data_ptr():
                    target.copy_(value)

    def destroy(self) -> None:
        """Overwrite all that the graph computed; what it only reads is not its own."""
        for func, args, kwargs, results in self._steps:
            if not func._schema.is_mutable:
                poison((args, kwargs), results)

    def note(self, func: Any, args: Any, kwargs: Any, results: Any) -> None:
        # Aliases: a tensor that gets other memory later must not take the recording along.
        self._steps.append(tuple(tree_map(alias, part) for part in (func, args, kwargs, results)))


class FakeCuda:
    """The names of ``torch.cuda`` that lsync uses.

    Attributes:
        log: what was waited for, recorded and replayed, in order.
        free: bytes that the device says are free.
    """

    def __init__(self, free: int = 2**40) -> None:
        self.log: list[str] = []
        self.graphs: list[CUDAGraph] = []
        self.free = free
        self.default_generators = [Generator()]
        self._main = Stream(self, "main")
        self._names = itertools.count(1)
        self._handles = itertools.count(1)
        self._local = threading.local()
        self._capturing: CUDAGraph | None = None
        self._recorded_on: Stream | None = None
        self._used: set[tuple[int, int]] = set()
        self._open: tuple[int, int] | None = None

    def Stream(self, device: Any = None) -> Stream:
        return Stream(self, f"side {next(self._names)}")

    def CUDAGraph(self) -> CUDAGraph:
        return CUDAGraph(self)

    def current_stream(self, device: Any = None) -> Stream:
        return getattr(self._local, "stream", self._main)

    def current_device(self) -> int:
        return 0

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = self.current_stream()
        self._local.stream = stream
        try:
            yield
        finally:
            self._local.stream = before

    @contextlib.contextmanager
    def graph(
        self, graph: CUDAGraph, pool: tuple[int, int], stream: Stream, capture_error_mode: str
    ) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        assert self._capturing is None
        assert self._open is None  # torch: the allocator thinks that another recording goes on
        assert stream is not self._main
        sharing = [other for other in self.graphs if other._pool == pool]
        # torch: a handle whose graphs are all gone must not be used again.
        assert sharing or pool not in self._used
        self._used.add(pool)
        self._local.stream = stream
        self.log.append(f"record on {stream.name}")
        self._capturing, graph._pool, self._recorded_on = graph, pool, stream
        mode = _Recorder(graph)
        self.default_generators[0].stuck = True
        try:
            with mode:
                yield
        finally:
            self._capturing = None
            if mode.spoiled:  # as in torch, the stream stays current and the pool open
                self._open = pool
                raise RuntimeError("CUDA error: operation failed due to a previous error")
        graph.ended = True
        self.default_generators[0].stuck = False
        self.graphs.append(graph)
        self._local.stream = self._main

    def is_current_stream_capturing(self) -> bool:
        return self._capturing is not None and self.current_stream() is self._recorded_on

    def graph_pool_handle(self) -> tuple[int, int]:
        return 0, next(self._handles)

    def _cuda_clearCublasWorkspaces(self) -> None:
        self.log.append("clear workspaces")

    def _cuda_endAllocateToPool(self, device: int, pool: tuple[int, int]) -> None:
        if self._open != pool:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self._open = None

    def _cuda_releasePool(self, device: int, pool: tuple[int, int]) -> None:
        assert self._open is None

    def memory_snapshot(self, pool: tuple[int, int]) -> list[dict[str, int]]:
        sizes = (graph_bytes(graph) for graph in self.graphs if graph._pool == pool)
        return [{"total_size": size} for size in sizes]

    def mem_get_info(self, device: Any) -> tuple[int, int]:
        return self.free, 2**40

    def memory_reserved(self, device: Any) -> int:
        return 0

    def memory_allocated(self, device: Any) -> int:
        return 0


class _Recorder(TorchDispatchMode):
    """Notes each operator instead of computing it."""

    def __init__(self, graph: CUDAGraph) -> None:
        super().__init__()
        self.graph = graph
        self.spoiled = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FORBIDDEN:
            self.spoiled = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
        if func._schema.is_mutable:
            self.graph.note(func, args, kwargs, None)
            return kwargs.get("out", args[0])
        results = func(*args, **kwargs)
        poison((args, kwargs), results)
        self.graph.note(func, args, kwargs, results)
        return results


def poison(inputs: Any, results: Any) -> None:
    """NaN, or the largest number, in all results that are no views of inputs."""
    known = {memory(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)}
    for result in tree_leaves(results):
        if isinstance(result, Tensor) and memory(result) not in known:
            if result.is_floating_point():
                result.fill_(float("nan"))
            elif result.dtype != torch.bool:
                result.fill_(torch.iinfo(result.dtype).max)


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def alias(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def graph_bytes(graph: CUDAGraph) -> int:
    results = (leaf for *_, result in graph._steps for leaf in tree_leaves(result))
    sizes = {memory(r): r.untyped_storage().nbytes() for r in results if isinstance(r, Tensor)}
    return sum(sizes.values())

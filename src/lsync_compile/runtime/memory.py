"""Static memory: what lies where, planned before the first run, and nothing allocated after it.

Three kinds of memory belong to a compiled graph. *Scratch* lives inside one call; a CUDA-graph
capture takes it from a private pool, and :func:`plan` says beforehand how much that will be.
*Static inputs* are what a captured graph reads at the same address in every call; they lie in the
arena of a :class:`BatchAwareMemoryPool`. *Weights* stay where their module has them.

A pool is shared by graphs that never run at the same time: one network at several sizes of batch
(guidance on and off), chunk (a clip's short last one) or resolution. Their static inputs lie over
each other, and so does their scratch, so a pool is as large as its largest graph and not as all of
them together.

Offsets are found greedily by size (Pisarchyk and Lee, "Efficient Memory Management for Deep Neural
Net Inference", arXiv:2001.03288).
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Bytes. torch's caching allocator aligns to as much, and no kernel asks for more.
ALIGNMENT = 512


@dataclass(frozen=True)
class Lifetime:
    """One buffer: its bytes, and the first and last point in time at which it is needed."""

    name: str
    size: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """Where each buffer lies in one arena.

    Attributes:
        offsets: bytes from the start of the arena, by name.
        size: bytes of the arena.
        bound: bytes alive at the worst moment; no arena can be smaller.
        summed: bytes without any reuse.
    """

    offsets: Mapping[str, int]
    size: int
    bound: int
    summed: int


def aligned(size: int) -> int:
    """``size`` rounded up to :data:`ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def plan(lifetimes: Iterable[Lifetime]) -> Plan:
    """Offsets such that buffers that are needed at the same time do not overlap.

    The largest buffer is placed first, each at the lowest offset that is free throughout its life.

    Raises:
        ValueError: for two buffers of one name, or a life that ends before it begins.
    """
    buffers = sorted(lifetimes, key=lambda each: (-each.size, each.first, each.name))
    sizes = np.array([aligned(each.size) for each in buffers], dtype=np.int64)
    first = np.array([each.first for each in buffers], dtype=np.int64)
    last = np.array([each.last for each in buffers], dtype=np.int64)
    if (last < first).any():
        name = buffers[int(np.argmax(last < first))].name
        raise ValueError(f"buffer {name!r} ends before it begins")
    offsets = np.zeros(len(buffers), dtype=np.int64)
    for index in range(len(buffers)):
        alive = (first[:index] <= last[index]) & (last[:index] >= first[index])
        offsets[index] = _lowest_gap(offsets[:index][alive], sizes[:index][alive], sizes[index])
    named = {each.name: int(offset) for each, offset in zip(buffers, offsets, strict=True)}
    if len(named) < len(buffers):
        raise ValueError("two buffers have the same name")
    return Plan(
        offsets=named,
        size=int((offsets + sizes).max(initial=0)),
        bound=_most_alive(first, last, sizes),
        summed=int(sizes.sum()),
    )


def _lowest_gap(begins: Any, sizes: Any, size: int) -> int:
    """The lowest offset with ``size`` free bytes between occupied ones."""
    order = np.argsort(begins, kind="stable")
    begins, ends = begins[order], (begins + sizes)[order]
    # Each gap begins where everything before has ended: occupied ones may overlap each other.
    starts = np.concatenate([[0], np.maximum.accumulate(ends)]) if len(ends) else np.zeros(1)
    fits = np.flatnonzero(begins - starts[:-1] >= size)
    return int(starts[fits[0]] if len(fits) else starts[-1])


def _most_alive(first: Any, last: Any, sizes: Any) -> int:
    if not len(sizes):
        return 0
    change = np.zeros(int(last.max()) - int(first.min()) + 2, dtype=np.int64)
    np.add.at(change, first - first.min(), sizes)
    np.add.at(change, last - first.min() + 1, -sizes)
    return int(change.cumsum().max())


class _Slab:
    """One allocation of an arena; goes when the last lease on it goes."""

    def __init__(self, size: int, device: torch.device) -> None:
        # Written in any gradient mode, which a tensor made in inference mode would refuse.
        with torch.inference_mode(False):
            self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.size = size

    def used_on(self, stream: Any) -> None:
        """Have the allocator wait for this stream too before it gives the memory to others."""
        if self.memory.is_cuda:
            self.memory.record_stream(stream)


class Lease:
    """The static buffers of one graph in a pool's arena; they hold the memory while they live."""

    def __init__(self, places: Sequence[tuple[_Slab, int]], size: int) -> None:
        self._places = tuple(places)
        self.size = size

    def tensor(self, index: int, like: Tensor) -> Tensor:
        """Buffer ``index`` with the size, strides and dtype of ``like``; contents undefined."""
        slab, offset = self._places[index]
        with torch.inference_mode(False):
            flat = slab.memory[offset : offset + span(like)].view(like.dtype)
            return flat.as_strided(like.size(), like.stride(), flat.storage_offset())


def span(like: Tensor) -> int:
    """Bytes from the first to the last element of a tensor of these sizes and strides."""
    if like.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    return (last + 1) * like.element_size()


class BatchAwareMemoryPool:
    """The static memory of graphs that take turns on one device.

    Args:
        device: where the memory is; a CPU too, which has no captures but the same arena.
        cuda: the module :mod:`torch.cuda` or one with its names; ``None`` on a CPU.
    """

    def __init__(self, device: torch.device, cuda: Any = None) -> None:
        self.device = device
        self._cuda = cuda
        self._lock = threading.RLock()
        self._slabs: list[weakref.ref[_Slab]] = []
        self._holder: weakref.ref[Lease] | None = None
        self._stream: Any = None
        self._last_stream: Any = None
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()
        self._handle: Any = None

    @property
    def static_bytes(self) -> int:
        """Bytes of the arena: as many as its largest lease needs, whatever else is leased."""
        with self._lock:
            return sum(slab.size for slab in self._live())

    def lease(self, sizes: Sequence[int]) -> Lease:
        """Buffers of these sizes in bytes, over those of other leases.

        The arena grows where they do not fit; what is leased already keeps its address.

        Raises:
            torch.OutOfMemoryError: where the device has no room to grow.
        """
        with self._lock:
            slabs = self._live()
            used = [0] * len(slabs)
            places: dict[int, tuple[_Slab, int]] = {}
            homeless: list[int] = []
            for index in sorted(range(len(sizes)), key=lambda each: -sizes[each]):
                for number, slab in enumerate(slabs):
                    if used[number] + aligned(sizes[index]) <= slab.size:
                        places[index] = slab, used[number]
                        used[number] += aligned(sizes[index])
                        break
                else:
                    homeless.append(index)
            if homeless:
                slab = _Slab(sum(aligned(sizes[index]) for index in homeless), self.device)
                self._slabs.append(weakref.ref(slab))
                offset = 0
                for index in homeless:
                    places[index] = slab, offset
                    offset += aligned(sizes[index])
            ordered = [places[index] for index in range(len(sizes))]
            return Lease(ordered, sum(aligned(size) for size in sizes))

    def join(self, user: Any) -> None:
        """Note whose ``release()`` gives memory of the pool back."""
        self._users.add(user)

    def release(self) -> None:
        """Have all users give their memory back."""
        for user in list(self._users):
            user.release()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other threads out for the block."""
        with self._lock:
            yield

    @contextmanager
    def turn(self, lease: Lease) -> Iterator[bool]:
        """Have the pool for the block; gives whether the lease's contents are as they were left.

        Threads wait for each other. Work on the device does too: where the current stream is
        another one than in the last turn, it waits for what that stream has been given so far.
        """
        with self._lock:
            if self._cuda is not None:
                stream = self._cuda.current_stream(self.device)
                if self._last_stream is not None and stream != self._last_stream:
                    stream.wait_stream(self._last_stream)
                if stream != self._last_stream:
                    self._last_stream = stream
                    for slab in self._live():
                        slab.used_on(stream)
            untouched = self._holder is not None and self._holder() is lease
            self._holder = None  # contents are undefined after an error in the middle
            yield untouched
            self._holder = weakref.ref(lease)

    @property
    def stream(self) -> Any:
        """The side stream on which all graphs of the pool are warmed up and captured.

        One for all: the allocator gives a capture only blocks that were freed on its stream.
        """
        if self._stream is None:
            self._stream = self._cuda.Stream(self.device)
        return self._stream

    def handle(self) -> Any:
        """Token of the private pool that captures take their scratch from.

        A plain token, and a new one whenever no graph of the old one is left: torch refuses to
        share a pool that nobody uses any more.
        """
        if self._handle is None or not self._graphs:
            self._handle = self._cuda.graph_pool_handle()
        return self._handle

    def add(self, graph: Any) -> None:
        """Count a captured graph as a user of :meth:`handle` for as long as it lives."""
        self._graphs.add(graph)

    def scratch_bytes(self) -> int:
        """Bytes that the captures' private pool has taken from the device."""
        if self._cuda is None or self._handle is None:
            return 0
        segments = self._cuda.memory_snapshot(self._handle)
        return sum(segment["total_size"] for segment in segments)

    def available_bytes(self) -> int | None:
        """Bytes of the device that nobody uses; ``None`` where nothing counts them."""
        return None if self._cuda is None else free_on_gpu(self.device, self._cuda)

    def _live(self) -> list[_Slab]:
        slabs = [slab for reference in self._slabs if (slab := reference()) is not None]
        self._slabs = [weakref.ref(slab) for slab in slabs]
        return slabs


class MemoryPools:
    """The pools of one compiled object, one for each group of graphs that take turns.

    Stages of a pipeline that may work at the same time (the UNet, the VAE) are groups of their own.
    """

    def __init__(self) -> None:
        self._pools: dict[tuple[str, torch.device], BatchAwareMemoryPool] = {}
        self._lock = threading.Lock()

    def get(self, group: str, device: torch.device, cuda: Any = None) -> BatchAwareMemoryPool:
        """The pool of a group on a device, made on first use."""
        with self._lock:
            key = group, device
            if key not in self._pools:
                self._pools[key] = BatchAwareMemoryPool(device, cuda)
            return self._pools[key]

    def release(self) -> None:
        """Give back what captured graphs hold, even where something still holds the graphs."""
        with self._lock:
            pools = list(self._pools.values())
        for pool in pools:
            pool.release()


def free_on_gpu(device: torch.device, cuda: Any = torch.cuda) -> int:
    """Bytes of a GPU that can be allocated: what is free, and what torch holds and does not use.

    Args:
        device: the GPU.
        cuda: the module :mod:`torch.cuda` or one with its names.
    """
    free, _ = cuda.mem_get_info(device)
    return int(free + cuda.memory_reserved(device) - cuda.memory_allocated(device))


def readable(size: int) -> str:
    """Bytes for people: ``"1.3 GiB"``."""
    if size < 1024:
        return f"{size} B"
    power = min(int(math.log2(size) // 10), 3)
    return f"{size / 1024**power:.1f} {('', 'KiB', 'MiB', 'GiB')[power]}"

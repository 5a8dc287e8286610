"""The work of a run as stages that overlap: while one chunk is denoised the next is read.

Each stage has a thread and, on a GPU, a stream of its own or one that it shares with others. Chunks
pass through bounded queues in their order, one chunk in one stage at a time, so whatever a stage
does it does in the same order as the serial run, and the results are the same bytes. On the device
an event is handed on with each chunk: the next stage's stream waits for it, the host does not, and
there is no device-wide synchronisation.

No thread waits without end for another: each looks every tenth of a second whether the run has been
given up, and a run that stands still says so (:mod:`lsync_compile.runtime.waits`).
"""

from __future__ import annotations

import contextlib
import contextvars
import queue
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from lsync_compile.runtime.timeline import Timeline
from lsync_compile.runtime.transfers import event_now
from lsync_compile.runtime.waits import Watch

_PATIENCE = 0.1  # seconds between looks at whether the run has been given up
_END = object()
_CALLER = "the caller"


@dataclass(frozen=True)
class Stage:
    """One kind of work.

    Attributes:
        name: in the report and in traces.
        work: item in, item out; called for the items in their order, by one thread.
        on_device: whether it launches work on the device, and so runs on a stream.
        stream: stages on the device that name the same one share it, and so take turns there; the
            others have one each.
    """

    name: str
    work: Callable[[Any], Any]
    on_device: bool = False
    stream: str = ""


@dataclass(frozen=True)
class _Link:
    """One end of a queue: who is there, and whom they wait for."""

    queue: queue.Queue[Any]
    who: str
    whom: str


@dataclass(frozen=True)
class _Failure:
    error: BaseException


class _GivenUpError(Exception):
    """Ends a thread whose run is over."""


class PipelineParallelProcessor:
    """Runs items through stages, overlapped or one after the other.

    Args:
        source: gives the items; iterated in a thread of its own.
        stages: in the order of an item's way.
        device: where stages that are `on_device` work.
        parallel: False runs everything in the caller's thread and stream.
        in_flight: how many items exist at a time, the one the caller has included. Host memory is
            this many chunks.
        shape: items of a shape not seen before pass a device stage while no other device stage
            runs: graphs are compiled and captured then.
        timeline: takes the times of all work.
        reading: the source's name in it.

    Iterate over it once. Leaving the iteration early, or an error in any stage, ends all threads
    before the iterator returns; errors reach the caller in the order of the items.
    """

    def __init__(
        self,
        source: Iterable[Any],
        stages: Iterable[Stage],
        device: torch.device,
        *,
        parallel: bool,
        in_flight: int = 4,
        shape: Callable[[Any], Hashable] = lambda item: None,
        timeline: Timeline | None = None,
        reading: str = "read",
    ) -> None:
        self.timeline = timeline or Timeline()
        self._source = source
        self._stages = tuple(stages)
        self._device = device
        self._parallel = parallel
        self._shape = shape
        self._reading = reading
        self._room = threading.Semaphore(in_flight)
        self._given_up = threading.Event()
        self._turns = _Turns()
        self._watch = Watch()
        self._seen: set[tuple[str, Hashable]] = set()

    def __iter__(self) -> Iterator[Any]:
        return self._overlapped() if self._parallel else self._serial()

    def _serial(self) -> Iterator[Any]:
        source = iter(self._source)
        for number, item in self._read(source):
            for stage in self._stages:
                with self.timeline.span(stage.name, number, self._timed_on(stage)):
                    item = stage.work(item)
            yield item

    def _read(self, source: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        number = 0
        while True:
            with self.timeline.span(self._reading, number) as span:
                item = next(source, _END)
                span.keep = item is not _END
            if item is _END:
                return
            yield number, item
            number += 1

    def _overlapped(self) -> Iterator[Any]:
        queues: list[queue.Queue[Any]] = [queue.Queue(1) for _ in range(len(self._stages) + 1)]
        start = event_now(self._device)
        streams = self._streams()
        names = [self._reading, *(stage.name for stage in self._stages), _CALLER]
        jobs: list[tuple[str, Callable[[], None]]] = [
            (self._reading, lambda: self._feed(_Link(queues[0], self._reading, names[1])))
        ]
        for place, (stage, stream) in enumerate(zip(self._stages, streams, strict=True)):
            before = _Link(queues[place], stage.name, names[place])
            after = _Link(queues[place + 1], stage.name, names[place + 2])
            jobs.append((stage.name, _bind(self._pass_on, stage, stream, start, before, after)))
        ending = _Link(queues[-1], _CALLER, names[-2])
        threads = [
            # Each thread sees the caller's context variables, in a copy of its own.
            threading.Thread(
                target=contextvars.copy_context().run, args=(job,), name=f"lsync-{name}"
            )
            for name, job in jobs
        ]
        begun: list[threading.Thread] = []
        try:
            for thread in threads:
                thread.start()  # which fails where there are too many
                begun.append(thread)
            while (passed := self._take(ending)) is not _END:
                if isinstance(passed, _Failure):
                    raise passed.error
                number, item, event = passed
                self._arrive(item, event)
                self._watch.does(_CALLER, f"has item {number}")
                yield item
                del item, passed
                self._room.release()
        finally:
            self._given_up.set()
            for thread in begun:
                thread.join()
            if self._on_gpu:
                here = torch.cuda.current_stream(self._device)
                for stream in streams:
                    if stream is not None:
                        here.wait_stream(stream)

    def _feed(self, after: _Link) -> None:
        """Read items while there is room for them."""
        with self._reported(after):
            source = iter(self._source)
            try:
                self._wait_for_room()
                for number, item in self._read(source):
                    self._put(after, (number, item, None))
                    del item
                    self._wait_for_room()
            finally:
                close = getattr(source, "close", None)  # a generator holds its files open
                if close is not None:
                    close()

    def _wait_for_room(self) -> None:
        self._watch.does(self._reading, "waits for room (all items that may exist do)")
        while not self._room.acquire(timeout=_PATIENCE):
            self._look_up(self._reading)
        self._watch.does(self._reading, "reads")

    def _look_up(self, who: str) -> None:
        """Called now and then by who waits."""
        if self._given_up.is_set():
            raise _GivenUpError
        self._watch.look(who)

    def _pass_on(
        self,
        stage: Stage,
        stream: Any,
        start: Any,
        before: _Link,
        after: _Link,
    ) -> None:
        """Take items from one queue, work on them, put them into the next."""
        with self._reported(after), self._on(stream, start):
            while (passed := self._take(before)) is not _END:
                if isinstance(passed, _Failure):
                    self._put(after, passed)
                    return
                number, item, event = passed
                if stage.on_device:
                    self._arrive(item, event)
                elif event is not None:
                    self._watch.does(stage.name, f"waits for the device to be done with {number}")
                    event.synchronize()  # work on the host reads what the device has written
                key = (stage.name, self._shape(item))
                alone = stage.on_device and key not in self._seen
                with self._turn(stage, alone=alone):
                    what = f"works on item {number}" + ", alone as its shape is new" * alone
                    self._watch.does(stage.name, what, may_take_long=alone)
                    with self.timeline.span(stage.name, number, self._timed_on(stage)):
                        item = stage.work(item)
                self._seen.add(key)
                done = event_now(self._device) if stage.on_device else None
                self._put(after, (number, item, done))
                del item, passed, event, done

    def _turn(self, stage: Stage, *, alone: bool) -> AbstractContextManager[None]:
        """The device stages' turn for one of them; others need none."""
        if not stage.on_device:
            return contextlib.nullcontext()
        self._watch.does(stage.name, "waits for its turn on the device")
        return self._turns.take(alone=alone, meanwhile=lambda: self._look_up(stage.name))

    @contextlib.contextmanager
    def _reported(self, after: _Link) -> Iterator[None]:
        """Hand the end, or the error that was it, to the next stage."""
        with contextlib.suppress(_GivenUpError):
            try:
                yield
            except _GivenUpError:
                raise
            except BaseException as error:  # noqa: BLE001, raised again in the caller's thread
                self._put(after, _Failure(error))
            else:
                self._put(after, _END)

    def _put(self, into: _Link, value: Any) -> None:
        self._watch.does(into.who, f"waits for {into.whom} to take an item")
        while True:
            self._look_up(into.who)
            with contextlib.suppress(queue.Full):
                into.queue.put(value, timeout=_PATIENCE)
                return

    def _take(self, source: _Link) -> Any:
        self._watch.does(source.who, f"waits for {source.whom}")
        while True:
            self._look_up(source.who)
            with contextlib.suppress(queue.Empty):
                return source.queue.get(timeout=_PATIENCE)

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    def _streams(self) -> list[Any]:
        """Each stage's stream; None where it works on the host, or there is no GPU."""
        shared: dict[str, Any] = {}
        streams: list[Any] = []
        for stage in self._stages:
            stream = shared.get(stage.stream)
            if stream is None and stage.on_device and self._on_gpu:
                stream = torch.cuda.Stream(self._device)
            if stage.stream:
                shared[stage.stream] = stream
            streams.append(stream)
        return streams

    @contextlib.contextmanager
    def _on(self, stream: Any, start: Any) -> Iterator[None]:
        """Make a stream the current one, after what the caller's stream had been given."""
        if stream is None:
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            stream.wait_event(start)
            yield

    def _arrive(self, item: Any, event: Any) -> None:
        """Have the current stream wait for an item, and the allocator for the current stream."""
        if event is None:
            return
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(event)
        for tensor in tensors_of(item):
            if tensor.is_cuda:
                tensor.record_stream(stream)

    def _timed_on(self, stage: Stage) -> torch.device | None:
        return self._device if stage.on_device and self._on_gpu else None


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_of(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_of(each)
    elif is_dataclass(value) and not isinstance(value, type):
        for spec in fields(value):
            yield from tensors_of(getattr(value, spec.name))


class _Turns:
    """Any number of users at a time, or one that wants to be alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users = 0
        self._waiting = 0  # to be alone; no one else begins meanwhile

    @contextlib.contextmanager
    def take(self, *, alone: bool, meanwhile: Callable[[], None]) -> Iterator[None]:
        """Have a turn for the block; ``meanwhile`` is called while waiting, and may raise."""
        used = False
        try:
            with self._changed:
                # To be alone it counts as waiting until it is done, which keeps the others out.
                self._waiting += alone
                while not self._changed.wait_for(lambda: self._free(alone), _PATIENCE):
                    meanwhile()
                self._users += 1
                used = True
            yield
        finally:
            with self._changed:
                self._users -= used
                self._waiting -= alone
                self._changed.notify_all()

    def _free(self, alone: bool) -> bool:
        return self._users == 0 if alone else self._waiting == 0


def _bind(function: Callable[..., None], *arguments: Any) -> Callable[[], None]:
    return lambda: function(*arguments)

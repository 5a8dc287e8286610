"""Makes one CUDA graph of a function: warms it up, records it, and cleans up where that fails."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lsync_compile.lowering.base import GraphFunction
from lsync_compile.runtime.memory import BatchAwareMemoryPool

log = logging.getLogger(__name__)

WARM_UPS = 2  # the first tunes and loads, the second runs as the recording will

# What warming up and recording may raise. Run plain, the graph either works or raises it again.
CAPTURE_ERRORS = (
    RuntimeError,  # a forbidden call while recording (AcceleratorError), OutOfMemoryError
    AssertionError,  # compiled code checks sizes and strides of its inputs
)

# One recording at a time in the process: it empties torch's caches and stops the collector.
_RECORDING = threading.Lock()


class RefusalError(Exception):
    """Why a graph is not captured after all."""


def record(
    call: GraphFunction, inputs: list[Any], pool: BatchAwareMemoryPool, cuda: Any = torch.cuda
) -> tuple[Any, tuple[Any, ...]]:
    """Record what ``call(*inputs)`` does on the device.

    Args:
        call: returns a tuple or list; it has no effects but its results.
        inputs: what it reads in each replay, at these addresses.
        pool: gives the stream and the private pool of memory; the caller has its turn.
        cuda: the module :mod:`torch.cuda`, or one with its names.

    Returns:
        The CUDA graph and the results, whose contents are undefined until it is replayed.

    Raises:
        RefusalError: saying what about the function, or the machine, cannot be recorded. All is
            then as before, random number generators too.
    """
    with _RECORDING:
        try:
            _warm_up(call, inputs, pool, cuda)
        except CAPTURE_ERRORS as error:
            raise RefusalError(_line(error)) from error
        graph, outputs = _capture(call, inputs, pool, cuda)
    pool.add(graph)
    return graph, outputs


def _warm_up(call: GraphFunction, inputs: list[Any], pool: BatchAwareMemoryPool, cuda: Any) -> None:
    """Run as the recording will, on its stream, and see that the graph is a pure function."""
    stream = pool.stream
    generator = cuda.default_generators[cuda.current_device()]
    offset = generator.get_offset()
    versions = _versions(inputs)
    stream.wait_stream(cuda.current_stream())
    with cuda.stream(stream):
        for _ in range(WARM_UPS):
            outputs = call(*inputs)
    cuda.current_stream().wait_stream(stream)
    if generator.get_offset() != offset:
        generator.set_offset(offset)
        raise RefusalError("it draws random numbers")
    if _versions(inputs) != versions:
        raise RefusalError("it writes to an input")
    if not isinstance(outputs, (tuple, list)):
        raise RefusalError(f"it returns a {type(outputs).__name__}, no tuple")
    memory = {value.untyped_storage().data_ptr() for value in inputs if _is_filled(value)}
    for output in outputs:
        if _is_filled(output) and output.untyped_storage().data_ptr() in memory:
            raise RefusalError("it returns an input")


def _capture(
    call: GraphFunction, inputs: list[Any], pool: BatchAwareMemoryPool, cuda: Any
) -> tuple[Any, tuple[Any, ...]]:
    graph, handle, cause = cuda.CUDAGraph(), pool.handle(), ""
    try:
        # A failed recording leaves its stream current; the outer block does not.
        with (
            cuda.stream(pool.stream),
            _quiet(cuda),
            cuda.graph(graph, pool=handle, stream=pool.stream, capture_error_mode="thread_local"),
        ):
            try:
                outputs = call(*inputs)
            except CAPTURE_ERRORS as error:
                cause = _line(error)  # ending the recording will fail too, with less to say
                raise
    except CAPTURE_ERRORS as error:
        _unwind(graph, handle, cuda)
        _free_generator(pool, cuda)
        log.debug("capture failed", exc_info=error)
        raise RefusalError(cause or _line(error)) from error
    except BaseException:  # an interrupt, or what is no error of capturing
        _unwind(graph, handle, cuda)
        _free_generator(pool, cuda)
        raise
    return graph, tuple(outputs)


@contextlib.contextmanager
def _quiet(cuda: Any) -> Iterator[None]:
    """Nothing is freed in the block that was made outside it.

    The collector would destroy other graphs' memory in the middle of a recording. Workspaces that
    cuBLAS got before would be freed one day under a graph that uses them; cleared, new ones come
    from the graph's own pool.
    """
    clear = _internals(cuda)._cuda_clearCublasWorkspaces
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    clear()
    try:
        yield
    finally:
        clear()
        if collects:
            gc.enable()


def _unwind(graph: Any, handle: Any, cuda: Any) -> None:
    """Tell the allocator that a recording is over which ended in an error.

    Up to torch 2.14 a graph whose recording was invalidated does not do so itself: the allocator
    would take every later request for memory to be part of it (pytorch pull request 180395).
    """
    try:
        graph.pool()
    except RuntimeError:
        internals, device = _internals(cuda), cuda.current_device()
        for undo in (internals._cuda_endAllocateToPool, internals._cuda_releasePool):
            with contextlib.suppress(RuntimeError):  # done already, in some versions
                undo(device, handle)


def _free_generator(pool: BatchAwareMemoryPool, cuda: Any) -> None:
    """Let the device draw random numbers again after a recording that ended in an error.

    Beginning one tells the generator, ending one does, but an invalidated one does not come that
    far (``CUDAGraph::capture_end``): from then on each random operation in the process raises
    "Offset increment outside graph capture". So something is recorded that cannot fail.
    """
    with contextlib.suppress(*CAPTURE_ERRORS), cuda.stream(pool.stream):
        scratch = torch.empty(1, device=pool.device)
        scratch.zero_()
        with (
            _quiet(cuda),
            cuda.graph(
                cuda.CUDAGraph(),
                pool=cuda.graph_pool_handle(),
                stream=pool.stream,
                capture_error_mode="thread_local",
            ),
        ):
            scratch.zero_()


def _internals(cuda: Any) -> Any:
    """Where torch has what it does not offer in :mod:`torch.cuda`."""
    return torch._C if cuda is torch.cuda else cuda


def _versions(inputs: Sequence[Any]) -> list[int]:
    """Counts of writes; inference tensors do not count them."""
    return [
        value._version for value in inputs if isinstance(value, Tensor) and not value.is_inference()
    ]


def _is_filled(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 0


def _line(error: Exception) -> str:
    """The error in one line."""
    lines = (line.strip() for line in str(error).splitlines())
    first = next((line for line in lines if line), "no message")
    short = isinstance(error, torch.OutOfMemoryError)
    return f"memory is short: {first}" if short else f"{type(error).__name__}: {first}"

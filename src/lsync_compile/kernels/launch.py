"""How kernels are launched, and where they are not.

A `Kernel` is a function in Triton's language with the few configurations it may run in. On a GPU
the fastest of them is found once for each combination of shapes and dtypes and remembered, on disk
too (Triton's own cache). Under Triton's interpreter (``TRITON_INTERPRET=1``) the first one that
fits is taken. Without Triton, and on a CPU without the interpreter, ops run their references.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsync_compile.cores import usable_cores

try:
    import triton
    import triton.language as tl
    from triton.errors import TritonError
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # platforms without Triton
    triton = tl = TensorDescriptor = None
    TritonError = RuntimeError

log = logging.getLogger(__name__)

__all__ = [
    "INTERPRETED",
    "OLDEST",
    "Config",
    "Kernel",
    "Launch",
    "TensorDescriptor",
    "capability",
    "function",
    "kernel",
    "record_launches",
    "recording",
    "runs_kernel",
    "supports",
    "tl",
]

INTERPRETED: bool = triton is not None and bool(triton.knobs.runtime.interpret)

# Compute capability that the kernels need of an NVIDIA GPU. What is compiled for an older one
# spills thousands of registers, or does not fit (benchmarks/kernels_elsewhere.py).
OLDEST = (8, 0)

# Triton 3.10 changes the default, and 3.9 warns of it.
OPTIONS: Mapping[str, Any] = {"enable_fp_fusion": True}

Grid = Callable[[Mapping[str, Any]], tuple[int, ...]]


@dataclass(frozen=True)
class Config:
    """One way to run a kernel: its block sizes, and warps and pipeline stages a program."""

    blocks: Mapping[str, int]
    warps: int = 4
    stages: int = 1


Fits = Callable[[Config, Mapping[str, Any]], bool]


@dataclass(frozen=True)
class Launch:
    """One launch as `record_launches` sees it: arguments by name, all but the configuration's."""

    kernel: Kernel
    arguments: dict[str, Any]

    @property
    def configs(self) -> list[Config]:
        """The configurations that it may run in."""
        return self.kernel.candidates(self.arguments)


class Kernel:
    """A kernel in Triton's language and how to launch it.

    Args:
        function: the kernel; constants are keyword arguments annotated ``tl.constexpr``.
        configs: what to choose from; the first is the default.
        key: arguments whose values, with the dtypes of all tensors, make a choice valid again.
        fits: whether a configuration is worth trying for these arguments, by name.
    """

    def __init__(
        self,
        function: Callable[..., None],
        configs: Sequence[Config],
        key: Sequence[str],
        fits: Fits | None,
    ) -> None:
        self.name = function.__name__.strip("_")
        self.__module__ = function.__module__  # where its source is, for keys of caches
        self.configs = tuple(configs)
        self.jitted: Any = None if triton is None else triton.jit(function)
        self._names = tuple(function.__code__.co_varnames[: function.__code__.co_argcount])
        self._key = list(key)
        self._fits = fits
        # Triton's autotuner keeps the arguments of the call under way in itself.
        self._lock = threading.Lock()
        self._ahead: Callable[[], None] | None = None  # compiles what is about to be timed

    def candidates(self, arguments: Mapping[str, Any]) -> list[Config]:
        """The configurations that fit these arguments; all of them if none does."""
        if self._fits is None:
            return list(self.configs)
        return [c for c in self.configs if self._fits(c, arguments)] or list(self.configs)

    def launch(self, grid: Grid, *args: Any, **constants: Any) -> None:
        """Run the kernel on ``grid``, a function of the configuration's block sizes.

        Raises:
            RuntimeError: no configuration can run on this GPU.
        """
        if _recorded is not None:
            arguments = dict(zip(self._names, args, strict=False)) | constants
            _recorded.append(Launch(self, arguments))
        elif INTERPRETED:
            arguments = dict(zip(self._names, args, strict=False)) | constants
            blocks = self.candidates(arguments)[0].blocks
            self.jitted[grid(blocks)](*args, **constants, **blocks)
        else:
            # Triton launches on the current device, torch on that of the tensors.
            with self._lock, torch.cuda.device_of(_tensor(args)):
                try:
                    self._tuner[grid](*args, **constants, **OPTIONS)
                except TritonError as error:
                    raise RuntimeError(f"{self.name} cannot run on this GPU: {error}") from error
                finally:
                    self._ahead = None  # it holds the arguments

    @functools.cached_property
    def _tuner(self) -> Any:
        tuned = {
            triton.Config(dict(c.blocks), num_warps=c.warps, num_stages=c.stages): c
            for c in self.configs
        }

        def prune(configs: list[Any], named: dict[str, Any], **kwargs: Any) -> list[Any]:
            chosen = self.candidates({**named, **kwargs})
            kept = [config for config in configs if tuned[config] in chosen]
            constants = {name: value for name, value in kwargs.items() if name != "warmup"}
            self._ahead = functools.partial(
                compile_together,
                self.jitted,
                [(tuple(named.values()), constants | config.all_kwargs()) for config in kept],
            )
            return kept

        def time(call: Callable[[], Any], quantiles: Sequence[float]) -> Any:
            # Not in prune: a choice that is on disk needs one of the candidates only.
            if self._ahead is not None:
                self._ahead()
                self._ahead = None
            # Milliseconds. Enough to tell apart what differs by a few per cent.
            try:
                return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)
            except TritonError as error:  # it does not compile for this GPU, or does not fit it
                log.info("%s: a configuration cannot run: %s", self.name, error)
                return [math.inf] * len(quantiles)

        return triton.autotune(
            list(tuned),
            self._key,
            prune_configs_by={"early_config_prune": prune},
            do_bench=time,
            cache_results=True,
        )(self.jitted)


def compile_together(jitted: Any, ways: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
    """Compile a kernel for several (arguments, keywords) side by side, without running it.

    One that cannot be compiled is left to fail where it is used.
    """
    workers = max(1, min(len(ways), usable_cores()))
    with (
        ThreadPoolExecutor(workers, thread_name_prefix="lsync-compile") as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        for positional, keywords in ways:
            jitted.warmup(*positional, **keywords)


def kernel(
    configs: Sequence[Config],
    *,
    key: Sequence[str] = (),
    fits: Fits | None = None,
) -> Callable[[Callable[..., None]], Kernel]:
    """Decorator that makes a function in Triton's language a `Kernel`; see there."""
    return lambda function: Kernel(function, configs, key, fits)


def function(body: Callable[..., Any]) -> Any:
    """Decorator for a function in Triton's language that kernels call."""
    return body if triton is None else triton.jit(body)


def _tensor(args: Iterable[Any]) -> Tensor:
    """The first tensor among a kernel's arguments, or the one that a descriptor is of."""
    found = (getattr(value, "base", value) for value in args)
    return next(value for value in found if isinstance(value, Tensor))


def runs_kernel(x: Tensor) -> bool:
    """Whether an op on ``x`` launches its kernel; it runs its reference otherwise."""
    if INTERPRETED or triton is None or not x.is_cuda:
        return INTERPRETED
    return supports(x.device)


def supports(device: torch.device, needed: tuple[int, int] = OLDEST) -> bool:
    """Whether a GPU has a compute capability; AMD's have none, and are not kept out."""
    return bool(torch.version.hip) or capability(device) >= needed


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def recording() -> bool:
    """Whether launches are recorded instead of run, see `record_launches`."""
    return _recorded is not None


_recorded: list[Launch] | None = None


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect the launches of this block instead of running them (tensors may be on "meta")."""
    global _recorded
    _recorded, before = [], _recorded
    try:
        yield _recorded
    finally:
        _recorded = before

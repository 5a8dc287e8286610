"""Which of several ways to compute the same is fastest: timed once, then remembered."""

from __future__ import annotations

import functools
import logging
import math
import statistics
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lsync_compile import compile_cache
from lsync_compile.sources import module_uuid

log = logging.getLogger(__name__)

Key = tuple[Any, ...]
"""All that times depend on beside the device: dtypes, shapes, strides."""

_lock = threading.Lock()


class Choices:
    """What was found fastest, for one op.

    Kept on disk too, so that a later process need not time it again and computes by the same way:
    for this model of GPU, these versions and the sources of the op's module.

    Args:
        module: name of the module that chooses.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._found: dict[tuple[torch.device, Key], str] = {}

    def get(self, device: torch.device, key: Key) -> str | None:
        """The name that was chosen in this process, if any."""
        return self._found.get((device, key))

    def fastest(
        self, device: torch.device, key: Key, calls: Callable[[], Mapping[str, Callable[[], Any]]]
    ) -> str:
        """Name of the fastest call; "" where nothing can run, or nothing can be timed.

        The first time a key is seen its calls run some 30 times each. While a CUDA graph is
        captured nothing can be timed, and nothing is remembered: make the first call before.

        Args:
            device: a CUDA device.
            key: what the times depend on.
            calls: gives the ways, by name. One that raises RuntimeError is left out.
        """
        found = self.get(device, key)
        if found is not None or torch.cuda.is_current_stream_capturing():
            return found or ""
        with _lock:
            if (device, key) not in self._found:
                self._found[device, key] = self._decide(device, key, calls())
        return self._found[device, key]

    def names(self) -> list[str]:
        """What was chosen so far, in order."""
        return list(self._found.values())

    def clear(self) -> None:
        """Forget what this process found."""
        self._found.clear()

    def _decide(
        self, device: torch.device, key: Key, calls: Mapping[str, Callable[[], Any]]
    ) -> str:
        name = compile_cache.digest([*self._versions, torch.cuda.get_device_name(device), key])
        kept = compile_cache.read("fastest", name)
        if isinstance(kept, str) and kept in calls:
            return kept
        times = {name: _milliseconds(name, call, device) for name, call in calls.items()}
        log.debug("%s: %s", key, times)
        best = min(times, key=lambda name: times[name], default="")
        if times.get(best, math.inf) == math.inf:
            return ""
        compile_cache.write("fastest", name, best)
        return best

    @functools.cached_property
    def _versions(self) -> tuple[Any, ...]:
        cudnn = torch.backends.cudnn.version()
        return module_uuid(sys.modules[self._module]), torch.__version__, cudnn


def _milliseconds(name: str, call: Callable[[], object], device: torch.device) -> float:
    """Of one call; infinite where it cannot run after all."""
    try:
        with torch.cuda.device(device):
            for _ in range(3):
                call()
            rounds: list[float] = []
            for _ in range(5):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(1_000_000)  # lets the host run ahead of short kernels
                begin.record()
                for _ in range(5):
                    call()
                end.record()
                end.synchronize()
                rounds.append(begin.elapsed_time(end) / 5)
    except RuntimeError as error:  # how torch says that a kernel does not take these tensors
        log.info("%s cannot run: %s", name, error)
        return math.inf
    return statistics.median(rounds)

"""Which of several ways to compute the same is fastest: timed once, then remembered."""

from __future__ import annotations

import logging
import math
import statistics
import threading
from collections.abc import Callable, Hashable, Mapping, MutableMapping
from typing import Any

import torch

log = logging.getLogger(__name__)

_lock = threading.Lock()


def fastest(
    chosen: MutableMapping[Any, str],
    key: Hashable,
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
) -> str:
    """Name of the fastest call; "" where nothing can run, or nothing can be timed.

    The first time a key is seen its calls run some 30 times each. While a CUDA graph is captured
    nothing can be timed, and nothing is remembered: make the first call before.

    Args:
        chosen: what was found before, by key; added to.
        key: all that the times depend on: device, dtypes, shapes, strides.
        calls: the ways, by name. One that raises RuntimeError is left out.
        device: a CUDA device.
    """
    if key in chosen or torch.cuda.is_current_stream_capturing():
        return chosen.get(key, "")
    with _lock:
        if key not in chosen:
            times = {name: _milliseconds(name, call, device) for name, call in calls.items()}
            log.debug("%s: %s", key, times)
            best = min(times, key=lambda name: times[name], default="")
            chosen[key] = best if times.get(best, math.inf) < math.inf else ""
    return chosen[key]


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

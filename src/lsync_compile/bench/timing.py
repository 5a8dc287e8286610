"""Timing a call, comparing results, and what to say of the machine they come from."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: 20th, 50th and 80th percentile over ``runs``."""

    p20: float
    p50: float
    p80: float
    runs: int

    def to_dict(self) -> dict[str, float]:
        """The timing as plain data."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


class Clock:
    """Times on a device, read when all is done: nobody waits in between."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def now(self) -> Any:
        """Seconds on a CPU, on a GPU an event in the current stream."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Milliseconds; waits for the end."""
        if not self._on_gpu:
            return 1e3 * float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end))


def measure(
    call: Callable[[], object], device: torch.device, *, warmup: int = 3, runs: int = 20
) -> Timing:
    """Time ``call``: with CUDA events on a GPU, with the wall clock on a CPU."""
    for _ in range(warmup):
        call()
    clock = Clock(device)
    milliseconds = []
    for _ in range(runs):
        begin = clock.now()
        call()
        milliseconds.append(clock.between(begin, clock.now()))
    return Timing(*percentiles(milliseconds), runs=runs)


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """The 2-norm of the difference over that of the reference, in float64."""
    output, reference = output.double(), reference.double()
    return float(torch.linalg.vector_norm(output - reference) / torch.linalg.vector_norm(reference))


def largest_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference of an element, in float64."""
    return float((output.double() - reference.double()).abs().max())


def machine(device: torch.device) -> dict[str, str]:
    """Device, versions and date: part of every recorded result."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "diffusers", "lsync-compile"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "device": name or platform.machine(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        **versions,
    }

"""Launch a kernel twice on an H100 that is not there: Triton compiles, the driver does nothing.

Run by `test_launch`, with an empty ``TRITON_CACHE_DIR``. Prints what happened as JSON.
"""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lsync_compile.kernels import launch

geglu = importlib.import_module("lsync_compile.kernels.geglu")  # the package's name is the op's
KERNEL = geglu._geglu
launched: list[bool] = []  # one for each launch
together: list[int] = []  # how many were compiled side by side, each time


class Driver:
    """What Triton asks of one, without a device."""

    utils = SimpleNamespace(
        load_binary=lambda *args: (None, 0, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
    )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *args, **kwargs: launched.append(True)


def compile_together(jitted: Any, ways: Any) -> None:
    together.append(len(ways))
    original(jitted, ways)


def timed(call: Any, **kwargs: Any) -> list[float]:
    """Instead of the benchmark: the first call finds all of them compiled, and so do the others."""
    compiled.append(len(KERNEL.jitted.device_caches[0][0]))
    return [float(len(compiled))] * 3


original, launch.compile_together = launch.compile_together, compile_together
triton.testing.do_bench = timed
driver.set_active(Driver())
x = torch.zeros(64, 640, dtype=torch.float16)
results = []
for _ in range(2):  # the second chooses by what the first left on disk
    KERNEL = geglu._geglu = launch.Kernel(
        KERNEL.jitted.fn, KERNEL.configs, ["rows", "columns"], None
    )
    compiled: list[int] = []  # so many of the kernel when a configuration was timed
    launched.clear()
    together.clear()
    geglu.geglu_kernel(x)
    results.append(
        {
            "candidates": len(KERNEL.configs),
            "together": list(together),
            "when timed": compiled,
            "compiled": len(KERNEL.jitted.device_caches[0][0]),
            "launched": len(launched),
            "kept": KERNEL._ahead is not None,
        }
    )
print(json.dumps(results))

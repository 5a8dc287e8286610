"""Where the time of a call goes: device time by kind of kernel, from torch's profiler."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# By kernel name, the first that matches. Names are those of cuDNN, cuBLAS, CUTLASS, Inductor's
# Triton kernels (which list what they fuse), ATen and this package.
KINDS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        ("copy", r"memcpy|copy_kernel|copy_device|lip_rows"),
        ("copy", r"aten::(copy_|_to_copy|clone|contiguous)$"),
        ("fill", r"memset|fill"),
        ("attention", r"attention|flash|fmha|sdpa|softmax|_attend"),
        ("layout", r"nchwtonhwc|nhwctonchw|transpose_readwrite|convert_layout"),
        ("convolution", r"conv|fprop|dgrad|wgrad|implicit_gemm|winograd|xmma.*nhwc"),
        ("norm", r"norm|welford|moments|rowwise"),
        ("matmul", r"linear_geglu|gemm|cutlass|cublas|nvjet|matmul"),
        ("matmul", r"addmm|\bmm\b|_mm_|aten::(mm|bmm|linear)$"),
        ("concatenation", r"cat(array|_)|aten::cat$"),
        ("pointwise", r"triton_poi|elementwise|geglu|gelu|silu|quantise|spread"),
        ("pointwise", r"aten::(add|mul|sub|div)_?$"),
        ("reduction", r"triton_red|triton_per|reduce"),
    )
)


def kind_of(name: str) -> str:
    """The kind of a kernel by its name; "other" where none fits."""
    return next((kind for kind, pattern in KINDS if pattern.search(name)), "other")


def kernel_times(call: Callable[[], object], device: torch.device, calls: int = 3) -> dict:
    """Profile ``calls`` calls.

    Returns:
        ``kernels`` a call, ``milliseconds`` a call by kind (device time; on a CPU the operators'
        own time), and the 30 longest ``top`` kernels by name.
    """
    call()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiled:
        for _ in range(calls):
            call()
        if on_gpu:
            torch.cuda.synchronize(device)
    milliseconds: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    kernels = 0
    for event in profiled.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent <= 0:
            continue
        kind, each = kind_of(event.key), spent / 1e3 / calls
        milliseconds[kind] += each
        kernels += event.count
        rows.append(
            {"name": event.key[:160], "kind": kind, "calls": event.count / calls, "ms": each}
        )
    rows.sort(key=lambda row: -row["ms"])
    return {
        "kernels": round(kernels / calls),
        "milliseconds": {kind: round(ms, 4) for kind, ms in milliseconds.most_common()},
        "total": round(sum(milliseconds.values()), 4),
        "top": [{**row, "ms": round(row["ms"], 4)} for row in rows[:30]],
    }

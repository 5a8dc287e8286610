"""How fast are the kernels, against the memory limit and what else there is?

    python benchmarks/kernels.py                # at LatentSync's shapes, on a GPU
    python benchmarks/kernels.py --small        # any machine, a check of the script

One row for each kernel, shape and variant: ours, eager torch, Inductor (at ``--inductor`` sides)
and the library's own kernel where there is one. Each holds p20/p50/p80 milliseconds, the largest
relative error against float64, the least bytes that any version must move and the share of the
copy bandwidth, measured in the same run, that this makes. Our kernel is not timed where its error
is above its tolerance. On a GPU, calls are replayed from a CUDA graph that cycles through inputs
larger than the cache. No new Inductor variant or case starts once ``--budget`` seconds are spent.
Rows are recorded case by case; those of other cases that this machine measured before are kept.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, Timing, measure, merge_results
from kernel_cases import LEVELS, Case, cases
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lsync_compile.kernels import registered
from lsync_compile.kernels.accuracy import error, exact, largest_error
from lsync_compile.kernels.launch import runs_kernel
from lsync_compile.kernels.spatial_attention_kernels import flash_attention, takes

# The package's attributes of these names are the ops.
fp8_linear = importlib.import_module("lsync_compile.kernels.fp8_linear")
linear_geglu = importlib.import_module("lsync_compile.kernels.linear_geglu")
CACHE = 50 * 2**20  # bytes of an H100's L2
KEY = ("kernel", "case", "dtype", "variant")
SMALL_LEVELS = ((8, 64), (4, 64))

Call = Callable[..., Any]


@dataclass(frozen=True)
class Variant:
    """Another way to compute what a kernel does.

    ``call`` runs on ``prepare(*arguments)``, which is not timed; ``finish`` brings its output
    into the kernel's layout for the comparison with float64.
    """

    name: str
    call: Call
    prepare: Call = lambda *arguments: arguments
    finish: Call = lambda output: output


def eager_group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, shift: Any
) -> Tensor:
    """As the residual block and the transformers have it."""
    if shift is not None:
        x = x + shift[:, :, None, None, None]
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if silu else y


def eager(kernel: str) -> Call:
    """What the model does without the kernel."""
    return eager_group_norm if kernel == "group_norm_silu" else registered()[kernel].reference


def library(kernel: str, arguments: tuple[Any, ...]) -> list[Variant]:
    """The libraries' kernels for the same work, on inputs in the layout that they like best."""
    if kernel == "group_norm_silu":
        contiguous = lambda x, *rest: (x.contiguous(), *rest)  # noqa: E731
        return [Variant("torch, contiguous", eager_group_norm, contiguous)]
    if kernel == "spatial_attention":
        return by_head(arguments)
    if kernel == "linear_geglu":
        return products(arguments)
    if kernel == "fp8_linear":
        return eight_bits(arguments)
    if kernel != "temporal_attention":
        return []
    total, tokens, channels = arguments[0].shape
    frames, heads = arguments[3:5]

    def rearrange(*arguments: Any) -> tuple[Tensor, ...]:
        shape = (-1, frames, tokens, heads, channels // heads)
        return tuple(
            x.reshape(shape).permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()
            for x in arguments[:3]
        )

    def rearrange_back(out: Tensor) -> Tensor:
        out = out.reshape(-1, tokens, heads, frames, channels // heads).permute(0, 3, 1, 2, 4)
        return out.reshape(total, tokens, channels)

    return [
        Variant(
            f"sdpa {backend.name.lower()}, rearranged before",
            attention(backend),
            rearrange,
            rearrange_back,
        )
        for backend in backends(arguments[0])
    ]


def products(arguments: tuple[Any, ...]) -> list[Variant]:
    """Each of the ways that the op chooses from."""

    def rows(x: Tensor, *rest: Any) -> tuple[Any, ...]:
        return x.flatten(0, -2), *rest

    def back(out: Tensor) -> Tensor:
        return out.view(*arguments[0].shape[:-1], -1)

    if not runs_kernel(arguments[0]):
        return []
    return [
        Variant(name, linear_geglu.KERNELS[name], rows, back)
        for name in linear_geglu.usable(*rows(*arguments))
    ]


def eight_bits(arguments: tuple[Any, ...]) -> list[Variant]:
    """Each of the ways that the op chooses from, and its two parts alone."""

    def rows(x: Tensor, *rest: Any) -> tuple[Any, ...]:
        return x.flatten(0, -2), *rest

    def rounded_before(x: Tensor, *rest: Any) -> tuple[Any, ...]:
        return *rows(x, *rest), *fp8_linear.quantise_rows(x.flatten(0, -2))

    def product(
        x: Tensor, weight: Tensor, bias: Any, codes: Tensor, scales: Tensor, *own: Tensor
    ) -> Tensor:
        return torch._scaled_mm(
            own[0], codes.t(), own[1], scales.t(), bias, out_dtype=x.dtype, use_fast_accum=True
        )

    def back(out: Tensor) -> Tensor:
        return out.view(*arguments[0].shape[:-1], -1)

    if not arguments[0].is_cuda:
        return []
    ways = [Variant(name, call, rows, back) for name, call in fp8_linear.KERNELS.items()]
    return [*ways, Variant("fp8, rounded before", product, rounded_before, back)]


def by_head(arguments: tuple[Any, ...]) -> list[Variant]:
    """Our own kernel; each library's, on views of rows and on tensors with the heads apart."""
    like, heads = arguments[0], arguments[3]

    def split(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(x.unflatten(2, (heads, -1)).transpose(1, 2) for x in arguments[:3])

    def copied(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(x.contiguous() for x in split(*arguments))

    def merge(out: Tensor) -> Tensor:
        return out.transpose(1, 2).flatten(2)

    own, views = [], split(*arguments)
    if runs_kernel(like) and takes(*views, None):
        own.append(Variant("own kernel", flash_attention, split, merge))
    return own + [
        Variant(f"sdpa {backend.name.lower()}{label}", attention(backend), prepare, merge)
        for backend in backends(like)
        for label, prepare in (("", split), (", heads apart", copied))
    ]


def backends(like: Tensor) -> list[SDPBackend]:
    """torch's attention kernels on the device of a tensor."""
    if not like.is_cuda:
        return [SDPBackend.MATH]
    return [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    ]


def attention(backend: SDPBackend) -> Call:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def least_bytes(arguments: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> int:
    """Every input read once and every output written once."""
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    size = arguments[0].element_size()
    return sum(t.numel() * t.element_size() for t in tensors) + sum(
        t.numel() * size for t in outputs
    )


def timed(call: Call, inputs: list[tuple[Any, ...]], device: torch.device, runs: int) -> Timing:
    """Milliseconds of one call, cycling through ``inputs``."""
    if device.type != "cuda":
        turns = itertools.cycle(inputs)
        return measure(lambda: call(*next(turns)), device, warmup=1, runs=runs)
    for _ in range(2):
        call(*inputs[0])
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(*arguments) for arguments in inputs]
    timing = measure(graph.replay, device, warmup=2, runs=runs)
    del kept
    return Timing(*(p / len(inputs) for p in (timing.p20, timing.p50, timing.p80)), runs=runs)


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second, read plus written, of a copy of ``size`` bytes."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (measure(lambda: target.copy_(source), device).p50 * 1e-3)


def run_case(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    bandwidth: float,
    *,
    inductor: bool,
    runs: int,
) -> list[dict[str, Any]]:
    """The rows of one case: ours first, each variant that runs after it."""
    spec = registered()[case.kernel]
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    arguments = case.arguments(draw)
    reference = exact(spec, *arguments)
    moved = least_bytes(arguments, reference)
    copies = 1 if device.type == "cpu" else min(8, max(1, math.ceil(4 * CACHE / moved)))
    inputs = [arguments, *(case.arguments(draw) for _ in range(copies - 1))]
    common = {
        "kernel": case.kernel,
        "case": case.label,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": moved,
        "copy_bandwidth": round(bandwidth),
    }

    def row(variant: Variant, **extra: Any) -> dict[str, Any]:
        prepared = [variant.prepare(*arguments) for arguments in inputs]
        wrong = largest_error(variant.finish(variant.call(*prepared[0])), reference)
        timing = timed(variant.call, prepared, device, runs)
        return {
            **common,
            "variant": variant.name,
            **timing.to_dict(),
            "relative_error": wrong,
            "share_of_copy_bandwidth": round(moved / (timing.p50 * 1e-3) / bandwidth, 4),
            **extra,
        }

    rows = []
    own, bound = error(spec, *arguments), spec.tolerances[dtype].relative
    if own <= bound:
        path = "kernel" if runs_kernel(arguments[0]) else "reference"
        rows.append(row(Variant("lsync", spec.op), path=path))
    else:
        refusal = f"not timed: relative error {own:.3g} is above {bound:g}"
        rows.append({**common, "variant": "lsync", "relative_error": own, "refused": refusal})
    rows.append(row(Variant("eager", eager(case.kernel))))
    for variant in library(case.kernel, arguments):
        try:
            rows.append(row(variant))
        except RuntimeError as reason:  # how torch says that a backend does not take these inputs
            first = str(reason).strip().partition("\n")[0]
            rows.append({**common, "variant": variant.name, "unsupported": first})
    if inductor:
        torch._dynamo.reset()
        rows.append(row(Variant("inductor", torch.compile(eager(case.kernel), dynamic=False))))
    return rows


def skipped(case: Case, variant: str, reason: str) -> dict[str, Any]:
    """A row that says why there is no result; shown, not recorded."""
    return {"kernel": case.kernel, "case": case.label, "variant": variant, "skipped": reason}


def show(row: dict[str, Any]) -> None:
    text = row.get("refused") or row.get("unsupported") or row.get("skipped")
    if text is None:
        text = (
            f"{row['p50']:8.4f} ms  {row['share_of_copy_bandwidth']:6.1%} of copy  "
            f"error {row['relative_error']:.1e}"
        )
    print(f"{row['kernel']:19s} {row['case']:29s} {row['variant']:41s} {text}", flush=True)


def main() -> None:
    begin = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="few channels and pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--kernels", nargs="+", default=list(registered()), choices=registered())
    parser.add_argument("--sides", type=int, nargs="+", help="sides of the latents to measure")
    parser.add_argument("--inductor", type=int, nargs="*", default=(64,), metavar="SIDE")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--budget", type=float, default=80.0, help="seconds (default 80)")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.json")
    arguments = parser.parse_args()

    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    bandwidth = copy_bandwidth(device, 2**30 if device.type == "cuda" else 2**24)
    print(f"copy bandwidth {bandwidth / 1e12:.3f} TB/s")
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for case in cases(SMALL_LEVELS, 1, 4) if arguments.small else cases(LEVELS):
            if case.kernel not in arguments.kernels:
                continue
            if arguments.sides is not None and case.side not in arguments.sides:
                continue
            spent = (time.perf_counter() - begin) / arguments.budget
            if spent > 1:
                new = [skipped(case, "all", f"not run: {arguments.budget:g} s were spent")]
            else:
                inductor = case.side in arguments.inductor
                new = run_case(
                    case,
                    device,
                    dtype,
                    bandwidth,
                    inductor=inductor and spent < 0.7,
                    runs=arguments.runs,
                )
                if inductor and spent >= 0.7:
                    new.append(skipped(case, "inductor", "not run: little time was left"))
            for row in new:
                show(row)
            measured = [row for row in new if "skipped" not in row]
            if measured:
                # At once: a later case that fails must not cost what was measured.
                merge_results(arguments.out, __doc__.splitlines()[0], device, measured, KEY)
            rows += measured
    print(f"{time.perf_counter() - begin:.0f} s")
    refused = [row for row in rows if "refused" in row]
    if refused:
        raise SystemExit(f"{len(refused)} kernels are wrong and were not timed")


if __name__ == "__main__":
    main()

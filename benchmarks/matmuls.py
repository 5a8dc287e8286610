"""What do the matrix products of a UNet step cost, at least, and with other epilogues and numbers?

    python benchmarks/matmuls.py                   # on a GPU
    python benchmarks/matmuls.py --list            # any machine: the products and their floors

The products are those of LatentSync's UNet at full size, queries, keys and values joined
(`fuse_qkv`), found without its weights. A row for each shape holds how many a step has, FLOP, and
the least milliseconds that arithmetic (``--tflops``) and memory (``--terabytes``: operands and
result) allow. On a GPU also the median milliseconds of the library's product; of that without its
bias, for which cuBLASLt may choose another kernel; of a residual sum after it; of a product that
starts from the residual; and of eight-bit numbers, made in the call and before it. No shape is
begun once ``--budget`` seconds are spent.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, STAGE2_512, write_results
from kernels import fp8_linear, timed
from torch import Tensor
from torch.fx import GraphModule

from lsync_compile.graph.build import example
from lsync_compile.graph.match import argument, calls
from lsync_compile.models.unet import UNet3DConditionModel
from lsync_compile.options import Options
from lsync_compile.passes.fuse_qkv import FuseQkv
from lsync_compile.passes.fuse_temporal_attention import FuseTemporalAttention
from lsync_compile.passes.spec import PassContext

Shape = tuple[int, int, int]  # M rows, N columns, K summed


def products(side: int, frames: int, batch: int) -> Counter[tuple[Shape, bool]]:
    """How often a step has a product of each shape, with a bias or none, 16 rows or more."""
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        context = PassContext(Options(kernels="on"), "unet")
        for each in (FuseTemporalAttention, FuseQkv):
            each().rewrite(gm, context)  # their vetoes ask for a device
        graphs.append(gm)
        return gm.forward

    with torch.device("meta"), torch.no_grad():
        unet = UNet3DConditionModel.from_config(STAGE2_512).half().requires_grad_(False)
        sample = torch.empty(batch, unet.config.in_channels, frames, side, side).half()
        sound = torch.empty(batch * frames, 50, unet.config.cross_attention_dim).half()
        torch._dynamo.reset()
        torch.compile(unet, backend=backend, dynamic=False)(sample, torch.empty(()), sound)
    graphs[0].graph.eliminate_dead_code()
    found: Counter[tuple[Shape, bool]] = Counter()
    for node in graphs[0].graph.nodes:
        if not calls(node, F.linear):
            continue
        x, out = example(argument(node, 0, "input")), example(node)
        assert x is not None
        assert out is not None
        shape = x.numel() // x.shape[-1], out.shape[-1], x.shape[-1]
        if shape[0] >= 16:
            found[shape, argument(node, 2, "bias") is not None] += 1
    return found


def floors(shape: Shape, flops: float, bandwidth: float) -> dict[str, Any]:
    """Work of one product, and the least milliseconds that it takes."""
    m, n, k = shape
    moved = 2 * (m * k + n * k + m * n)
    arithmetic, memory = 2e3 * m * n * k / flops, 1e3 * moved / bandwidth
    return {
        "m": m, "n": n, "k": k, "gflop": round(2e-9 * m * n * k, 3),
        "least_ms": round(max(arithmetic, memory), 4),
        "bound": "arithmetic" if arithmetic > memory else "memory",
        # A residual sum of its own reads product and residual and writes the sum.
        "sum_ms": round(3 * 2e3 * m * n / bandwidth, 4),
    }  # fmt: skip


def times(shape: Shape, device: torch.device, runs: int) -> dict[str, float]:
    """Median milliseconds of each way, those that run."""
    m, n, k = shape
    dtype = torch.float16

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device).to(dtype)

    x, weight, bias, residual = draw(m, k), draw(n, k) * k**-0.5, draw(n), draw(m, n)
    codes, scales = fp8_linear.quantised(weight)
    own = fp8_linear.quantise_rows(x)

    ways: dict[str, Any] = {
        "library": lambda: F.linear(x, weight, bias),
        "library, no bias": lambda: F.linear(x, weight),
        "library, then sum": lambda: F.linear(x, weight, bias) + residual,
        "from residual": lambda: torch.addmm(residual, x, weight.t()),
        "fp8": lambda: fp8_linear.in_dtype(x, weight, bias, codes, scales),
        "fp8 by bfloat16": lambda: fp8_linear.in_bfloat16(x, weight, bias, codes, scales),
        "fp8, rounded before": lambda: torch._scaled_mm(
            own[0], codes.t(), own[1], scales.t(), bias, out_dtype=dtype, use_fast_accum=True
        ),
    }
    found = {}
    for name, way in ways.items():
        try:
            found[name] = timed(way, [()] * 4, device, runs).p50
        except RuntimeError as reason:  # what this version of CUDA has no product for
            print(f"    {name}: {str(reason).strip().splitlines()[0]}")
    return found


def main() -> None:
    begin = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="nothing is timed")
    parser.add_argument("--side", type=int, default=64, help="of the latents")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tflops", type=float, default=700.0)
    parser.add_argument("--terabytes", type=float, default=3.0, help="a second")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds (default 60)")
    parser.add_argument("--out", type=Path, default=RESULTS / "matmuls.json")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.list else "cuda")

    rows: list[dict[str, Any]] = []
    total: Counter[str] = Counter()
    with torch.no_grad():
        found = products(arguments.side, arguments.frames, arguments.batch)
        costs = {
            key: floors(key[0], arguments.tflops * 1e12, arguments.terabytes * 1e12)
            for key in found
        }
        for key in sorted(found, key=lambda key: -found[key] * costs[key]["least_ms"]):
            count, cost = found[key], costs[key]
            row = {"count": count, "bias": key[1], **cost}
            if not arguments.list and time.perf_counter() - begin < arguments.budget:
                row["ms"] = times(key[0], device, arguments.runs)
            rows.append(row)
            for name in ("gflop", "least_ms"):
                total[name] += count * cost[name]
            for name, value in row.get("ms", {}).items():
                total[name] += count * value
            measured = "  ".join(f"{name} {ms:.4f}" for name, ms in row.get("ms", {}).items())
            print(
                f"{count:3d} x {cost['m']:6d} {cost['n']:5d} {cost['k']:5d} "
                f"{'bias' if key[1] else '    '} {cost['gflop']:7.1f} GFLOP  "
                f"least {cost['least_ms']:.4f} ms ({cost['bound']})  {measured}",
                flush=True,
            )
    print({name: round(value, 2) for name, value in total.items()})
    write_results(arguments.out, __doc__.splitlines()[0], device, rows)


if __name__ == "__main__":
    main()

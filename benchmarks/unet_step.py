"""What does one UNet step cost: eager, Inductor, lsync, and each of its passes?

    python benchmarks/unet_step.py                             # full size, on a GPU
    python benchmarks/unet_step.py --small                     # any machine, a check of the script
    python benchmarks/unet_step.py --list                      # names of all variants
    python benchmarks/unet_step.py --waterfall to --seconds 540 --batches 2 --lowering eager
    python benchmarks/unet_step.py --latents 64 32 --dtypes float16 bfloat16 --variants lsync
    python benchmarks/unet_step.py --variants inductor lsync --profile --batches 2

Random weights and inputs of the shapes and the structure that a run has: equal halves of the sample
and silence in the first half of the sound with guidance, conditions that stay in a chunk, and a
step context around each call. The full size is LatentSync 1.6's UNet; 64x64 latents are 512 px.

A row holds p20/p50/p80 milliseconds of a step inside a chunk; ``chunk_step``, the milliseconds a
step of a whole chunk of ``--steps``, which includes what is computed once a chunk; the largest and
the relative error against the same weights in float64; the seconds of the first call (compilation)
and the share of the arithmetic ceiling, measured in the same run. Rows are written as they come and
merged into the file: a call with ``--seconds`` starts no variant that would not be done by then,
and the same call again measures what is missing.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    STAGE2_512,
    largest_error,
    measure,
    merge_results,
    recorded,
    relative_error,
)
from exact_values import in_float64
from kernel_time import kernel_times
from torch.utils.flop_counter import FlopCounterMode
from variants import LOSSY, WATERFALLS, all_variants, compiled, options_of, waterfall

import lsync_compile
from lsync_compile.bench.networks import Steps, arithmetic_ceiling, random_inputs, random_unet
from lsync_compile.bench.sizes import SMALL_UNET as SMALL
from lsync_compile.models.unet import UNet3DConditionModel

KEY = ("variant", "guidance", "dtype", "latents", "frames")
LARGEST_ERROR = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}  # relative; beyond is a bug
LOSSY_ERROR = 0.3  # of approximate variants: random weights say nothing of a trained network's


class Case:
    """One size, dtype and guidance mode: the inputs, the exact result and the work in FLOP."""

    def __init__(
        self, unet: UNet3DConditionModel, config: dict[str, Any], frames: int, batch: int
    ) -> None:
        parameter = next(unet.parameters())
        self.inputs = random_inputs(config, frames, batch, parameter.device, parameter.dtype)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(**self.inputs)
        self.flops = counter.get_total_flops()
        self.exact = in_float64(unet, lambda wide, given: wide(**given).sample, self.inputs).cpu()
        self.labels = {
            "guidance": batch == 2,
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "latents": config["sample_size"],
            "frames": frames,
        }


def measure_case(
    variant: str,
    unet: UNet3DConditionModel,
    case: Case,
    arguments: argparse.Namespace,
    ceiling: float,
) -> dict[str, Any]:
    """One row: compile if need be, compare, time.

    Raises:
        SystemExit: the result is wrong; nothing of it is timed.
    """
    device = case.inputs["sample"].device
    steps = Steps(unet, case.inputs, arguments.steps)
    with compiled(variant, unet) as handle:
        begin = time.perf_counter()
        output = steps(0).cpu()  # waits for the device
        first = time.perf_counter() - begin
        error = relative_error(output, case.exact)
        lossy = any(name in variant for name in LOSSY)
        if not error < (LOSSY_ERROR if lossy else LARGEST_ERROR[case.labels["dtype"]]):
            raise SystemExit(f"{variant}: relative error {error:.3g}; not timed")
        steps.chunk()
        timing = measure(steps, device, warmup=2, runs=arguments.runs)
        chunk = measure(steps.chunk, device, warmup=0, runs=2)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        profile = kernel_times(steps, device) if arguments.profile else None
        passes = [] if handle is None else handle.report().graphs[-1].passes
        row = {
            "variant": variant,
            **case.labels,
            **timing.to_dict(),
            "chunk_step": round(chunk.p50 / arguments.steps, 4),
            "relative_error": error,
            "largest_error": largest_error(output, case.exact),
            "first_call_seconds": round(first, 2),
            "tflop": round(case.flops / 1e12, 4),
            "share_of_ceiling": round(case.flops / (timing.p50 * 1e-3) / ceiling, 4),
            "peak_mib": round(peak / 2**20, 1),
            "passes": {done.name: done.matches for done in passes if done.matches},
        }
    return row if profile is None else {**row, "profile": profile}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the variants' names")
    parser.add_argument("--small", action="store_true", help="small widths and latents")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(LARGEST_ERROR))
    parser.add_argument("--latents", type=int, nargs="+", help="side, 64 for 512 px")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20, help="denoising steps a chunk")
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[2, 1],
        choices=[2, 1],
        help="2 with guidance, 1 without; each is a compilation of its own",
    )
    parser.add_argument("--variants", nargs="+", help="default: eager inductor lsync")
    parser.add_argument("--waterfall", nargs="+", default=[], choices=WATERFALLS)
    parser.add_argument(
        "--lowering", choices=("inductor", "eager"), default="inductor", help="of the waterfall"
    )
    parser.add_argument("--profile", action="store_true", help="add kernel time by kind")
    parser.add_argument("--seconds", type=float, help="start nothing that would take longer")
    parser.add_argument("--again", action="store_true", help="measure what is on file too")
    parser.add_argument("--out", type=Path, default=RESULTS / "unet_step.json")
    arguments = parser.parse_args()
    variants = arguments.variants or ([] if arguments.waterfall else ["eager", "inductor", "lsync"])
    if arguments.waterfall:
        variants += waterfall(*arguments.waterfall, lowering=arguments.lowering)
    arguments.variants = list(dict.fromkeys(variants))
    for variant in arguments.variants:
        try:
            options_of(variant)
        except ValueError as error:
            parser.error(str(error))
    return arguments


def main() -> None:
    started = time.perf_counter()
    arguments = parse()
    if arguments.list:
        print("\n".join(all_variants()))
        return
    device = torch.device(arguments.device)
    config = SMALL if arguments.small else STAGE2_512
    question = __doc__.splitlines()[0]
    rows: list[dict[str, Any]] = []
    longest = 0.0
    dtypes = arguments.dtypes or ["float16" if device.type == "cuda" else "float32"]
    for name in dtypes:
        dtype = getattr(torch, name)
        ceiling = arithmetic_ceiling(device, dtype, 8192 if device.type == "cuda" else 1024)
        unet = random_unet(config, device).to(dtype)
        for side in arguments.latents or [config["sample_size"]]:
            for batch in arguments.batches:
                labels = {"guidance": batch == 2, "dtype": name, "latents": side,
                          "frames": arguments.frames}  # fmt: skip
                known = [] if arguments.again else recorded(arguments.out, question, device, KEY)
                wanted = [
                    variant
                    for variant in arguments.variants
                    if [variant, *labels.values()] not in known
                ]
                if not wanted:
                    continue
                case = Case(unet, {**config, "sample_size": side}, arguments.frames, batch)
                for variant in wanted:
                    begin = time.perf_counter()
                    if arguments.seconds and begin - started + longest > arguments.seconds:
                        print(f"out of time before {variant}, {labels}; run the same call again")
                        return
                    row = measure_case(variant, unet, case, arguments, ceiling)
                    longest = max(longest, time.perf_counter() - begin)
                    rows.append(row)
                    print(
                        f"{variant:34s} {name} {side} guidance {'on ' if batch == 2 else 'off'} "
                        f"p50 {row['p50']:8.2f} ms  chunk {row['chunk_step']:8.2f}  first "
                        f"{row['first_call_seconds']:6.1f} s  error {row['relative_error']:.2e}",
                        flush=True,
                    )
                    # At once: a later one that fails must not cost what was measured.
                    merge_results(arguments.out, question, device, rows, KEY)
        del unet
    print(f"ceiling {ceiling / 1e12:.0f} TFLOP/s, lsync-compile {lsync_compile.__version__}")


if __name__ == "__main__":
    main()

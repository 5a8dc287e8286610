"""What do the VAE's encoder and decoder cost: eager, Inductor, lsync?

    python benchmarks/vae.py                  # Stable Diffusion's VAE at 512 px, on a GPU
    python benchmarks/vae.py --small          # any machine, a check of the script
    python benchmarks/vae.py --variants inductor lsync --profile

Random weights. ``encode`` is what a chunk needs: the masked and the reference faces, in one call
of twice the frames and, as ``encode in two``, in two calls; ``decode`` is one call. A row holds
p20/p50/p80 milliseconds, the largest and the relative error against the same weights in float64
(of the first frames: float64 is slow), the seconds of the first call and the share of the
arithmetic ceiling, measured in the same run. ``inductor channels-last`` has the weights converted
beforehand, which is Inductor at its best here.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, largest_error, measure, merge_results, recorded, relative_error
from exact_values import in_float64
from kernel_time import kernel_times
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from unet_step import LARGEST_ERROR
from variants import compiled, options_of

from lsync_compile.bench.networks import arithmetic_ceiling, random_vae
from lsync_compile.bench.sizes import SD_VAE
from lsync_compile.bench.sizes import SMALL_VAE as SMALL

KEY = ("variant", "work", "dtype", "pixels", "frames")
CHANNELS_LAST = "inductor channels-last"
VARIANTS = ("eager", "inductor", CHANNELS_LAST, "lsync lowering=eager", "lsync")
COMPARED = 2  # frames of which the float64 result is computed


class Work:
    """A thing to do with the VAE: ``call(vae, inputs)``, and the first frames of it as exact."""

    def __init__(
        self, name: str, call: Callable[[Any, Tensor], Tensor], inputs: Tensor, vae: nn.Module
    ) -> None:
        self.name = name
        self.call = call
        self.inputs = inputs
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call(vae, inputs)
        self.flops = counter.get_total_flops()
        self.exact = in_float64(vae, call, inputs[:COMPARED]).cpu()


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Means and log variances of all pictures in one call."""
    moments: Tensor = vae.encode(pixels).latent_dist.parameters
    return moments


def encode_in_two(vae: Any, pixels: Tensor) -> Tensor:
    """The same, half of the pictures a call."""
    return torch.cat([encode(vae, half) for half in pixels.split(max(1, len(pixels) // 2))])


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pictures of latents."""
    pictures: Tensor = vae.decode(latents).sample
    return pictures


def measure_work(
    variant: str, vae: Any, work: Work, arguments: argparse.Namespace, ceiling: float
) -> dict[str, Any]:
    """One row.

    Raises:
        SystemExit: the result is wrong; nothing of it is timed.
    """
    device = work.inputs.device
    dtype = str(work.inputs.dtype).removeprefix("torch.")
    channels_last = variant == CHANNELS_LAST
    layout = torch.channels_last if channels_last else torch.contiguous_format
    vae.to(memory_format=layout)
    inputs = work.inputs.contiguous(memory_format=layout)
    with compiled("inductor" if channels_last else variant, nn.Identity(), vae) as handle:

        def call() -> Tensor:
            return work.call(vae, inputs)

        with torch.no_grad():
            begin = time.perf_counter()
            output = call()[:COMPARED].cpu()  # waits for the device
            first = time.perf_counter() - begin
            error = relative_error(output, work.exact)
            if not error < LARGEST_ERROR[dtype]:
                raise SystemExit(f"{variant} {work.name}: relative error {error:.3g}; not timed")
            timing = measure(call, device, runs=arguments.runs)
            profile = kernel_times(call, device) if arguments.profile else None
        passes = [] if handle is None else handle.report().graphs[-1].passes
    row = {
        "variant": variant,
        "work": work.name,
        "dtype": dtype,
        "pixels": arguments.pixels,
        "frames": arguments.frames,
        **timing.to_dict(),
        "relative_error": error,
        "largest_error": largest_error(output, work.exact),
        "first_call_seconds": round(first, 2),
        "tflop": round(work.flops / 1e12, 4),
        "share_of_ceiling": round(work.flops / (timing.p50 * 1e-3) / ceiling, 4),
        "passes": {done.name: done.matches for done in passes if done.matches},
    }
    return row if profile is None else {**row, "profile": profile}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small widths and pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(LARGEST_ERROR))
    parser.add_argument("--pixels", type=int, help="side of the pictures, 512 by default")
    parser.add_argument("--frames", type=int, default=16, help="of a chunk")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument(
        "--work",
        nargs="+",
        default=["encode", "encode in two", "decode"],
        choices=["encode", "encode in two", "decode"],
    )
    parser.add_argument("--profile", action="store_true", help="add kernel time by kind")
    parser.add_argument("--again", action="store_true", help="measure what is on file too")
    parser.add_argument("--out", type=Path, default=RESULTS / "vae.json")
    arguments = parser.parse_args()
    for variant in arguments.variants:
        try:
            options_of("inductor" if variant == CHANNELS_LAST else variant)
        except ValueError as error:
            parser.error(str(error))

    device = torch.device(arguments.device)
    config = SMALL if arguments.small else SD_VAE
    arguments.pixels = arguments.pixels or (64 if arguments.small else 512)
    question = __doc__.splitlines()[0]
    rows: list[dict[str, Any]] = []
    for name in arguments.dtypes or ["float16" if device.type == "cuda" else "float32"]:
        dtype = getattr(torch, name)
        ceiling = arithmetic_ceiling(device, dtype, 8192 if device.type == "cuda" else 1024)
        vae = random_vae(config, device, dtype)
        generator = torch.Generator(device).manual_seed(1)
        side, frames = arguments.pixels, arguments.frames

        def normal(*shape: int, dtype: torch.dtype = dtype, generator: Any = generator) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        jobs: dict[str, tuple[Callable[[Any, Tensor], Tensor], Tensor]] = {
            "encode": (encode, normal(2 * frames, 3, side, side).clamp(-1, 1)),
            "decode": (decode, normal(frames, 4, side // 8, side // 8)),
        }
        jobs["encode in two"] = (encode_in_two, jobs["encode"][1])
        known = [] if arguments.again else recorded(arguments.out, question, device, KEY)
        for each in arguments.work:
            work = Work(each, *jobs[each], vae)
            for variant in arguments.variants:
                if [variant, each, name, side, frames] in known:
                    continue
                row = measure_work(variant, vae, work, arguments, ceiling)
                rows.append(row)
                print(
                    f"{variant:24s} {each:14s} {name} p50 {row['p50']:8.2f} ms  first "
                    f"{row['first_call_seconds']:6.1f} s  error {row['relative_error']:.2e}",
                    flush=True,
                )
                merge_results(arguments.out, question, device, rows, KEY)


if __name__ == "__main__":
    main()

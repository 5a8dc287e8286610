"""What does sharing UNet calls between chunks cost a chunk, in time and memory?

    python benchmarks/batching.py                          # a GPU: full size, random weights
    python benchmarks/batching.py --device cpu             # the bundled model, its own size
    python benchmarks/batching.py --small                  # any machine, a check of the script
    python benchmarks/batching.py --variants lsync --latents 64 --guidance 1.5 --seconds 500

A row is one UNet call for so many chunks of 16 frames with the same timestep: p20/p50/p80
milliseconds of the call, ``ms_per_chunk``, ``first_chunk_ms`` (the denoising time after which the
first chunk of the batch is done, ``--steps`` calls), the memory that calls take beside weights and
inputs, and how far the chunks are from the same ones alone in the plain network (relative and
largest error of the predicted noise; rounding, as kernels are chosen by the size of the batch, and
of a variant its own). Rows are written as they come: a call with ``--seconds`` starts none that
would not be done by then, and the same call again measures what is missing. Plain networks come
first; every variant compiles once for each row.
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
    mouth_mask,
    recorded,
    relative_error,
)
from unet_step import SMALL, random_unet
from variants import all_variants, compiled

from lsync_compile.models.conditions import Conditions, joined
from lsync_compile.runtime.batching import chunk_bytes
from lsync_compile.runtime.context import step_context
from lsync_compile.runtime.region import make_region, mouth_region

QUESTION = __doc__.splitlines()[0]
KEY = ("model", "variant", "dtype", "latents", "guidance", "chunks")
LARGEST_ERROR = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}  # relative; beyond is a bug
TIMESTEP = 501


class Chunks:
    """Random inputs of some chunks of a run, and one UNet call for all or a part of them."""

    def __init__(self, unet: Any, chunks: int, side: int, frames: int, guided: bool) -> None:
        config = unet.config
        generator = torch.Generator(unet.device).manual_seed(1)

        def normal(*shape: int) -> torch.Tensor:
            drawn = torch.randn(shape, generator=generator, device=unet.device)
            return drawn.to(unet.dtype)

        self.unet, self.guided = unet, guided
        self.latents = [normal(1, 4, frames, side, side) for _ in range(chunks)]
        self.conditions = []
        for _ in range(chunks):
            fixed = normal(1, config.in_channels - 4, frames, side, side)
            sound = normal(frames, 50, config.cross_attention_dim)
            if guided:
                fixed = torch.cat([fixed, fixed])
                sound = torch.cat([torch.zeros_like(sound), sound])
            self.conditions.append(Conditions(sound, fixed))
        self.timestep = torch.tensor(TIMESTEP, device=unet.device)
        vouched = ("guidance", "null_audio") if guided else ()
        self.vouched = frozenset((*vouched, "constant_channels"))
        self.region = make_region(mouth_mask(side), side)
        self.run = object()
        self.joined: dict[tuple[int, int], Conditions] = {}

    @torch.no_grad()
    def __call__(self, first: int = 0, after: int | None = None, step: int = 1) -> torch.Tensor:
        """Predicted noise (n or 2 n, 4, f, h, w) of chunks ``first`` to before ``after``."""
        after = len(self.latents) if after is None else after
        part = first, after
        if part not in self.joined:
            self.joined[part] = joined(self.conditions[first:after], self.guided)
        conditions, latents = self.joined[part], self.latents[first:after]
        sample = torch.cat([*latents, *latents] if self.guided else latents)
        sample = torch.cat([sample, conditions.fixed], dim=1)
        place = step_context(
            self.run, first, step, 20, "reuse", timestep=float(TIMESTEP), vouched=self.vouched
        )
        with place, mouth_region(self.region):
            noise: torch.Tensor = self.unet(
                sample, self.timestep, encoder_hidden_states=conditions.audio
            ).sample
        return noise

    def alone(self) -> torch.Tensor:
        """What a call for all gives, from a call for each."""
        calls = [self(index, index + 1, step=0) for index in range(len(self.latents))]
        halves = [call.chunk(2 if self.guided else 1) for call in calls]
        return torch.cat([half for kind in zip(*halves, strict=True) for half in kind])


def measure_row(
    unet: Any, variant: str, names: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """One row.

    Raises:
        SystemExit: chunks together are not what they are alone.
    """
    device, dtype = unet.device, str(unet.dtype).removeprefix("torch.")
    guided, count = names["guidance"] > 1, names["chunks"]
    chunks = Chunks(unet, count, names["latents"], arguments.frames, guided)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with compiled(variant, unet):
        begin = time.perf_counter()
        together = chunks(step=0).cpu()
        first = time.perf_counter() - begin
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        timing = measure(chunks, device, warmup=2, runs=arguments.runs)
        peak = torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else None
    error = 0.0 if count == 1 else relative_error(together, alone := chunks.alone().cpu())
    if not error < LARGEST_ERROR[dtype]:
        raise SystemExit(f"{variant}, {count} chunks: relative error {error:.3g}; not recorded")
    positions = (2 if guided else 1) * arguments.frames * names["latents"] ** 2
    estimate = count * chunk_bytes(
        unet.config.block_out_channels[0], positions, unet.dtype.itemsize
    )
    return {
        **names,
        **timing.to_dict(),
        "ms_per_chunk": round(timing.p50 / count, 3),
        "first_chunk_ms": round(timing.p50 * arguments.steps, 1),
        "peak_call_mib": None if peak is None else round(peak / 2**20),
        "estimated_call_mib": round(estimate / 2**20),
        "relative_error": error,
        "largest_error": 0.0 if count == 1 else largest_error(together, alone),
        "first_call_seconds": round(first, 2),
        "frames": arguments.frames,
        "steps": arguments.steps,
    }


def model_of(arguments: argparse.Namespace, device: torch.device) -> tuple[str, Any]:
    """The network and what results call it."""
    if arguments.small:
        return "small, random", random_unet(dict(SMALL), device)
    if device.type == "cuda":
        return "full, random", random_unet(dict(STAGE2_512), device)
    from lsync_compile.models.checkpoint import load_unet, resolve_checkpoint

    mini = resolve_checkpoint("mini")
    unet = load_unet(mini.unet_file, mini.unet_config, dtype=torch.float32)
    return "mini", unet.to(device).eval().requires_grad_(False)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--small", action="store_true", help="small widths and latents")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=tuple(LARGEST_ERROR))
    parser.add_argument("--variants", nargs="+", choices=all_variants(), metavar="VARIANT")
    parser.add_argument("--latents", type=int, nargs="+", help="side, 64 for 512 px")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.5, 1.0])
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=140, help="start no row after these")
    parser.add_argument("--again", action="store_true", help="measure what is on file too")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure what is not on file yet, as far as the seconds go."""
    arguments, begin = parse(), time.monotonic()
    device = torch.device(arguments.device)
    dtype = arguments.dtype or ("float16" if device.type == "cuda" else "float32")
    model, unet = model_of(arguments, device)
    unet.to(getattr(torch, dtype))
    full = model.startswith("full")
    # One file a kind of machine: a CPU's rows would not be kept beside a GPU's.
    out = arguments.out or RESULTS / f"batching.{device.type}.json"
    variants = arguments.variants or ["eager", "lsync lowering=eager"][: 2 if full else 1]
    sides = arguments.latents or ([64, 32] if full else [unet.config.sample_size])
    done = [] if arguments.again else recorded(out, QUESTION, device, KEY)
    longest = 0.0
    for variant in variants:
        for side in sides:
            for guidance in arguments.guidance:
                for count in arguments.chunks:
                    names = {
                        "model": model,
                        "variant": variant,
                        "dtype": dtype,
                        "latents": side,
                        "guidance": guidance,
                        "chunks": count,
                    }
                    if [names[name] for name in KEY] in done:
                        continue
                    started = time.monotonic()
                    if started - begin + longest > arguments.seconds:
                        raise SystemExit("out of seconds; the same call again goes on from here")
                    row = measure_row(unet, variant, names, arguments)
                    longest = max(longest, time.monotonic() - started)
                    merge_results(out, QUESTION, device, [row], KEY)
                    print(
                        f"{variant:24s} {side:3d} guidance {guidance:.1f} chunks {count}: "
                        f"{row['ms_per_chunk']:9.2f} ms a chunk, peak {row['peak_call_mib']} MiB, "
                        f"error {row['relative_error']:.1e}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()

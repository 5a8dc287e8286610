"""Does a chunk take memory from the device, or wait for it, once everything is warm?

    python benchmarks/memory_gpu.py                          # full size, on a GPU
    python benchmarks/memory_gpu.py --small --lowering eager # a minute, a check of the script
    python benchmarks/memory_gpu.py --variants lsync --latents 64 --chunks 16 16 7 16 7

Random weights, whole chunks: both encodes, the denoising loop and the decode, chunks of several
lengths in a row. A row is one chunk: how often torch's allocator had to go to the device
(``device_allocations``, ``device_frees``), how often it was asked at all, the most that was in use
and reserved, and how often the host waited for the device between the first and the last step. The
last row of a variant is its plan: for each graph the scratch that was planned, the sum without
reuse, and what its pool took. The first chunk of each length warms up.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import RESULTS, STAGE2_512, merge_results
from diffusers import AutoencoderKL
from unet_step import SMALL as SMALL_UNET
from unet_step import random_unet
from vae import SD_VAE
from vae import SMALL as SMALL_VAE
from variants import compiled

from lsync_compile.models.scheduler import default_scheduler
from lsync_compile.models.synthesis import ChunkSynthesizer

KEY = ("variant", "lowering", "latents", "chunk")
VARIANTS = ("eager", "lsync", "lsync without=cuda_graphs")


class Watch:
    """Counts what the allocator and the host do in a chunk."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self.device = device
        self.steps = steps
        self.caught: list[warnings.WarningMessage] = []

    def __enter__(self) -> Watch:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._before = torch.cuda.memory_stats(self.device)
        self._catching = warnings.catch_warnings(record=True)
        self.caught = self._catching.__enter__()
        warnings.simplefilter("always")
        self._began = time.perf_counter()
        return self

    def step(self, done: int) -> None:
        """Called after each step; the host is watched from the first to the last."""
        torch.cuda.set_sync_debug_mode("default" if done == self.steps else "warn")

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize(self.device)
        self.seconds = time.perf_counter() - self._began
        self._catching.__exit__(None, None, None)

    def row(self) -> dict[str, Any]:
        """The counts as plain data."""
        after = torch.cuda.memory_stats(self.device)
        grown = {name: after[name] - self._before[name] for name in after}
        return {
            "device_allocations": grown["num_device_alloc"],
            "device_frees": grown["num_device_free"],
            "requests": grown["allocation.all.allocated"],
            "peak_mib": round(after["allocated_bytes.all.peak"] / 2**20),
            "reserved_mib": round(after["reserved_bytes.all.current"] / 2**20),
            "host_waits": sum("synchroniz" in str(each.message) for each in self.caught),
            "seconds": round(self.seconds, 3),
        }


def synthesizer(
    unet: Any, vae: Any, frames: int, steps: int, device: torch.device
) -> ChunkSynthesizer:
    """One run with guidance in chunks of ``frames`` or fewer, whose mask hides the lower half."""
    side = 8 * unet.config.sample_size
    mask = torch.ones(1, side, side, device=device)
    mask[:, side // 2 :] = 0
    # Not a Job: that imports the libraries for videos.
    job = SimpleNamespace(
        generator=torch.Generator(device).manual_seed(0), mask=mask, guidance_scale=1.5,
        guided=True, eta=0.0, num_inference_steps=steps, callback=None, callback_steps=1,
        num_frames=frames, session=None,
    )  # fmt: skip
    return ChunkSynthesizer(vae, unet, default_scheduler(), job, device)


def plans(handle: Any) -> list[dict[str, Any]]:
    """Planned and taken memory of each graph in MiB, or why it is not captured."""
    rows = []
    for graph in handle.report().graphs:
        capture = graph.capture
        if capture is None:
            continue
        rows.append(
            {"graph": graph.name, "inputs": graph.inputs, "state": capture.state}
            | ({"reason": capture.reason} if capture.reason else {})
            | {
                name.replace("_bytes", "_mib"): round(getattr(capture, name) / 2**20, 1)
                for name in ("planned_bytes", "summed_bytes", "static_bytes", "pool_bytes")
            }
            | {"replays": capture.replays, "seconds": round(capture.seconds, 2)}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small widths and latents")
    parser.add_argument("--latents", type=int, help="side of the latents; 64 is 512 px")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 16, 7, 16, 7, 16])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS / "memory_gpu.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("memory_gpu.py counts a GPU's memory, and torch sees no GPU")

    device = torch.device("cuda", torch.cuda.current_device())
    config = dict(SMALL_UNET if arguments.small else STAGE2_512)
    config["sample_size"] = arguments.latents or config["sample_size"]
    unet = random_unet(config, device).half()
    vae = AutoencoderKL(**(SMALL_VAE if arguments.small else SD_VAE), scaling_factor=0.18215)
    vae = vae.to(device).half().eval().requires_grad_(False)
    for variant in arguments.variants:
        torch.cuda.empty_cache()
        more = {} if variant == "eager" else {"lowering": arguments.lowering}
        with compiled(variant, unet, vae, **more) as handle:
            rows = measure_run(variant, unet, vae, arguments, device)
            if handle is not None:
                print(handle.report())
                rows.append({**names(variant, arguments, config), "chunk": "plan"})
                rows[-1]["graphs"] = plans(handle)
        merge_results(arguments.out, __doc__.splitlines()[0], device, rows, KEY)


def names(variant: str, arguments: argparse.Namespace, config: Any) -> dict[str, Any]:
    return {
        "variant": variant,
        "lowering": "eager" if variant == "eager" else arguments.lowering,
        "latents": config["sample_size"],
        "steps": arguments.steps,
    }


def measure_run(
    variant: str, unet: Any, vae: Any, arguments: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """One row for each chunk of a run."""
    run = synthesizer(unet, vae, max(arguments.chunks), arguments.steps, device)
    generator = torch.Generator(device).manual_seed(1)
    side, tokens = 8 * unet.config.sample_size, (50, unet.config.cross_attention_dim)
    rows = []
    for index, frames in enumerate(arguments.chunks):
        faces = torch.randint(256, (frames, 3, side, side), generator=generator, device=device)
        audio = torch.randn(frames, *tokens, generator=generator, device=device)
        with Watch(device, arguments.steps) as watch:
            run(index, faces.to(torch.uint8), audio, watch.step)
        row = {**names(variant, arguments, unet.config), "chunk": index, "frames": frames}
        rows.append(row | watch.row())
        print(json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    main()

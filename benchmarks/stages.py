"""A run's chunks through all stages but the files: one after the other, and side by side.

    python benchmarks/stages.py                        # full size, on a GPU
    python benchmarks/stages.py --small --device cpu   # a check of the script
    python benchmarks/stages.py --trace trace.json     # the timeline of the last run

Random weights and pictures of 1080 x 1920: cut the faces (batched), encode, denoise, decode, paste
(batched). Needs no video libraries. Prints, for each variant, serial and overlapped: frames a
second over the run after its first chunks, milliseconds a chunk of each stage, peak memory, and
whether the pasted frames of both orders are the same bytes; a result that is not fails the script.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, STAGE2_512, merge_results
from diffusers import AutoencoderKL
from memory_gpu import synthesizer
from torch import Tensor
from trace_picture import draw
from unet_step import SMALL as SMALL_UNET
from unet_step import random_unet
from vae import SD_VAE
from vae import SMALL as SMALL_VAE
from variants import compiled

from lsync_compile.media.align_batch import BatchAligner
from lsync_compile.media.geometry import FaceAligner
from lsync_compile.models.run import NETWORKS
from lsync_compile.runtime.stages import PipelineParallelProcessor, Stage
from lsync_compile.runtime.timeline import Timeline

KEY = ("variant", "lowering", "latents", "order", "steps")
WARM = 2  # chunks that compile and capture


@dataclass
class Passing:
    """A chunk on its way."""

    index: int
    frames: list[Any]
    matrices: list[Any]
    audio: Tensor
    value: Any = None
    pixels: Tensor | None = None


class Work:
    """The stages of one run; two runs of it do the same."""

    def __init__(self, unet: Any, vae: Any, arguments: argparse.Namespace) -> None:
        self.device = unet.device
        self.run = synthesizer(unet, vae, arguments.frames, arguments.steps, self.device)
        self.side = 8 * unet.config.sample_size
        self.aligner = BatchAligner(self.side, self.device)
        self.width = unet.config.cross_attention_dim
        self.arguments = arguments
        draw = np.random.default_rng(0)
        self.pictures = [draw.integers(0, 256, (1920, 1080, 3), dtype=np.uint8) for _ in range(4)]

    def source(self) -> Any:
        aligner, draw = FaceAligner(self.side), np.random.default_rng(1)
        shape = 60 * np.array([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        generator = torch.Generator().manual_seed(1)
        for index in range(self.arguments.chunks):
            count = self.arguments.frames
            frames = [self.pictures[(index + each) % 4] for each in range(count)]
            centres = np.array([540, 640]) + draw.uniform(-20, 20, (count, 2))
            matrices = [aligner.matrix(shape + centre) for centre in centres]
            audio = torch.randn(count, 50, self.width, generator=generator)
            yield Passing(index, frames, matrices, audio)

    def stages(self) -> list[Stage]:
        return [
            Stage("faces", self.cut, True),
            Stage("encode", self.encode, True, NETWORKS),
            Stage("denoise", self.denoise, True, NETWORKS),
            Stage("decode", self.decode, True, NETWORKS),
            Stage("paste", self.paste, True),
        ]

    def cut(self, passing: Passing) -> Passing:
        passing.value = self.aligner.crop(passing.frames, passing.matrices)
        return passing

    def encode(self, passing: Passing) -> Passing:
        passing.value = self.run.prepare(passing.value)
        return passing

    def denoise(self, passing: Passing) -> Passing:
        passing.pixels = passing.value.pixels
        passing.value = self.run.denoise(
            passing.index, passing.value, passing.audio, lambda step: None
        )
        return passing

    def decode(self, passing: Passing) -> Passing:
        assert passing.pixels is not None
        passing.value = self.run.decode(passing.value, passing.pixels)
        return passing

    def paste(self, passing: Passing) -> Passing:
        passing.frames = self.aligner.restore(passing.frames, passing.value, passing.matrices)
        return passing


def measure(
    unet: Any, vae: Any, arguments: argparse.Namespace, parallel: bool
) -> tuple[dict[str, Any], list[Any], Timeline]:
    """A row, the pasted frames of every chunk, and the timeline."""
    device = unet.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    work, timeline = Work(unet, vae, arguments), Timeline()
    processor = PipelineParallelProcessor(
        work.source(), work.stages(), device, parallel=parallel, timeline=timeline
    )
    results, begin = [], 0.0
    for passing in processor:
        if passing.index == WARM - 1:
            begin = time.perf_counter()
        results.append(sum(int(frame.astype(np.int64).sum()) for frame in passing.frames))
    seconds = time.perf_counter() - begin
    frames = (arguments.chunks - WARM) * arguments.frames
    return (
        {
            "order": "overlapped" if parallel else "serial",
            "frames_per_s": round(frames / seconds, 2),
            "chunk_ms": round(1000 * seconds / (arguments.chunks - WARM), 1),
            "stage_ms": {
                name: round(1000 * float(np.median(spent[WARM:])), 1)
                for name, spent in timeline.seconds().items()
            },
            "peak_device_mib": (
                round(torch.cuda.max_memory_allocated(device) / 2**20)
                if device.type == "cuda"
                else None
            ),
        },
        results,
        timeline,
    )


def keep_trace(timeline: Timeline, path: Path) -> None:
    """Write a timeline as a Chrome trace or, where the name does not end in .json, as an SVG."""
    trace = timeline.chrome_trace()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(trace) + "\n" if path.suffix == ".json" else draw(trace))
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small widths and latents")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--variant", default="lsync", help="eager, inductor or lsync")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--frames", type=int, default=16, help="a chunk")
    parser.add_argument("--trace", type=Path, help="file for it, .json or .svg")
    parser.add_argument("--out", type=Path, default=RESULTS / "stages.json")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    unet = random_unet(dict(SMALL_UNET if arguments.small else STAGE2_512), device).to(dtype)
    vae = AutoencoderKL(**(SMALL_VAE if arguments.small else SD_VAE), scaling_factor=0.18215)
    vae = vae.to(device, dtype).eval().requires_grad_(False)
    more = {} if arguments.variant == "eager" else {"lowering": arguments.lowering}
    rows, sums = [], []
    with compiled(arguments.variant, unet, vae, **more):
        for parallel in (False, True):
            row, result, timeline = measure(unet, vae, arguments, parallel)
            names = {
                "variant": arguments.variant,
                "lowering": more.get("lowering", "none"),
                "latents": unet.config.sample_size,
                "steps": arguments.steps,
            }
            rows.append(names | row)
            sums.append(result)
            print(json.dumps(rows[-1]), flush=True)
    if sums[0] != sums[1]:
        raise SystemExit("the overlapped run gives other bytes than the serial one")
    merge_results(arguments.out, __doc__.splitlines()[0], device, rows, KEY)
    if arguments.trace is not None:
        keep_trace(timeline, arguments.trace)


if __name__ == "__main__":
    main()

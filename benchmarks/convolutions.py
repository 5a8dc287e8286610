"""What do the convolutions of a chunk cost with their biases, without, and with channels padded?

    python benchmarks/convolutions.py              # on a GPU
    python benchmarks/convolutions.py --list       # any machine: the convolutions and their floors

Those of LatentSync's UNet at full size, for one step with guidance, and of Stable Diffusion's VAE,
which encodes two pictures a frame: half precision, channels last. A row for each shape holds how
many there are, FLOP, the least milliseconds that arithmetic (``--tflops``) allows and, on a GPU,
the median milliseconds as cuDNN's heuristics choose; with ``cudnn.benchmark``, which times what it
chooses from; without the bias; and with zeros up to a multiple of eight channels, where there are
others. Totals by network stand at the end of the output.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, STAGE2_512, write_results
from diffusers import AutoencoderKL
from kernels import timed
from torch import Tensor, nn

from lsync_compile.bench.sizes import SD_VAE
from lsync_compile.models.unet import UNet3DConditionModel

Shape = tuple[tuple[int, ...], tuple[int, ...], int, int]  # input, weight, stride, padding


def convolutions(side: int, frames: int) -> Counter[tuple[str, Shape]]:
    """How often a network convolves each shape."""
    found: Counter[tuple[str, Shape]] = Counter()

    def watch(network: str, module: nn.Module) -> None:
        def note(conv: Any, inputs: Any) -> None:
            size = inputs[0].shape
            if len(size) == 5:  # a video, frame by frame
                size = (size[0] * size[2], size[1], *size[3:])
            shape = tuple(size), tuple(conv.weight.shape), conv.stride[0], conv.padding[0]
            found[network, shape] += 1

        for each in module.modules():
            if isinstance(each, nn.Conv2d):
                each.register_forward_pre_hook(note)

    with torch.device("meta"), torch.no_grad():
        unet = UNet3DConditionModel.from_config(STAGE2_512).half()
        vae: Any = AutoencoderKL(**SD_VAE).half()
        watch("unet", unet)
        watch("encoder", vae.encoder)
        watch("decoder", vae.decoder)
        sample = torch.empty(2, unet.config.in_channels, frames, side, side).half()
        sound = torch.empty(2 * frames, 50, unet.config.cross_attention_dim).half()
        unet(sample, torch.empty(()), sound)
        vae.encoder(torch.empty(2 * frames, 3, 8 * side, 8 * side).half())
        vae.decoder(torch.empty(frames, 4, side, side).half())
    return found


def flop(shape: Shape) -> int:
    """Of one convolution, sums and products."""
    (n, _, height, width), weight, stride, padding = shape
    sides = [(size + 2 * padding - weight[2]) // stride + 1 for size in (height, width)]
    return 2 * n * math.prod(sides) * math.prod(weight)


def times(shape: Shape, device: torch.device, runs: int) -> dict[str, float]:
    """Median milliseconds of each way."""
    size, weight_size, stride, padding = shape
    last = torch.channels_last

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device, dtype=torch.float16)

    x = draw(*size).contiguous(memory_format=last)
    fan = weight_size[1] * weight_size[2] * weight_size[3]
    weight, bias = (
        (draw(*weight_size) * fan**-0.5).contiguous(memory_format=last),
        draw(weight_size[0]),
    )
    ways: dict[str, tuple[bool, Tensor, Tensor, Tensor | None]] = {
        "library": (False, x, weight, bias),
        "benchmark": (True, x, weight, bias),
        "no bias": (False, x, weight, None),
    }
    missing = -size[1] % 8
    if missing:
        wide = [
            F.pad(each, (0, 0, 0, 0, 0, missing)).contiguous(memory_format=last)
            for each in (x, weight)
        ]
        ways["padded, no bias"] = (False, wide[0], wide[1], None)
    found = {}
    for name, (benchmark, pictures, filters, shift) in ways.items():
        torch.backends.cudnn.benchmark = benchmark

        def way(
            pictures: Tensor = pictures, filters: Tensor = filters, shift: Tensor | None = shift
        ) -> Tensor:
            return F.conv2d(pictures, filters, shift, stride, padding)

        found[name] = timed(way, [()] * 4, device, runs).p50
    torch.backends.cudnn.benchmark = False
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="nothing is timed")
    parser.add_argument("--side", type=int, default=64, help="of the latents")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--tflops", type=float, default=735.0)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS / "convolutions.json")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.list else "cuda")

    rows: list[dict[str, Any]] = []
    totals: dict[str, Counter[str]] = {}
    with torch.no_grad():
        for (network, shape), count in convolutions(arguments.side, arguments.frames).items():
            work = flop(shape)
            row: dict[str, Any] = {
                "network": network, "count": count, "input": shape[0], "weight": shape[1],
                "stride": shape[2], "gflop": round(work / 1e9, 3),
                "least_ms": round(work / arguments.tflops / 1e9, 4),
            }  # fmt: skip
            if not arguments.list:
                row["ms"] = {
                    name: round(ms, 4) for name, ms in times(shape, device, arguments.runs).items()
                }
            rows.append(row)
            total = totals.setdefault(network, Counter())
            total["least_ms"] += count * row["least_ms"]
            for name, ms in row.get("ms", {}).items():
                total[name] += count * ms
            print(f"{network} {count:2d} x {shape} least {row['least_ms']} {row.get('ms', '')}")
    for network, total in totals.items():
        print(network, {name: round(value, 2) for name, value in total.items()})
    write_results(arguments.out, __doc__.splitlines()[0], device, rows)


if __name__ == "__main__":
    main()

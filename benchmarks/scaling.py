"""How does the work of a chunk grow, and what may smaller GPUs expect?

    python benchmarks/scaling.py            # any machine, three minutes

Two kinds of rows. *counted*: TFLOP of a UNet step, of the VAE and of a chunk of LatentSync 1.6,
counted by torch on tensors without memory, over resolution, frames a chunk, guidance and chunks in
a call; and the bytes of the weights. *modelled*: milliseconds of a UNet step and frames/s of the
presets on other GPUs, from what `lsync bench` last measured on one of those listed. A step is
between what it would take if only arithmetic and if only memory traffic counted: the measured time
by the ratio of the makers' figures for one or the other. That is no measurement.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, STAGE2_512, merge_results
from torch.utils.flop_counter import FlopCounterMode

from lsync_compile.bench.networks import random_vae
from lsync_compile.bench.sizes import SD_VAE
from lsync_compile.models.unet import UNet3DConditionModel

KEY = ("kind", "pixels", "frames", "guidance", "chunks", "gpu")
STEPS = 20
PRESETS = ("exact", "balanced", "turbo")
# (resolution, frames a chunk, guidance, chunks in a call)
SHAPES = [
    *((pixels, 16, True, 1) for pixels in (256, 384, 512, 768)),
    *((512, frames, True, 1) for frames in (8, 24)),
    (512, 16, False, 1),
    (512, 16, True, 2),
]
# Dense tensor-core TFLOP/s for fp16 products added up in fp32, and GB/s, as the makers state them.
STATED = {
    "H200 SXM 141 GB": (989.0, 4800.0),
    "H100 SXM 80 GB": (989.0, 3350.0),
    "A100 SXM 80 GB": (312.0, 2039.0),
    "L40S 48 GB": (362.0, 864.0),
    "RTX 4090 24 GB": (165.0, 1008.0),
    "RTX 3090 24 GB": (71.0, 936.0),
    "L4 24 GB": (121.0, 300.0),
}

# By the name that torch has for it; another with a like name is another GPU.
DEVICES = {
    "NVIDIA H200": "H200 SXM 141 GB",
    "NVIDIA H100 80GB HBM3": "H100 SXM 80 GB",
    "NVIDIA A100-SXM4-80GB": "A100 SXM 80 GB",
    "NVIDIA L40S": "L40S 48 GB",
    "NVIDIA GeForce RTX 4090": "RTX 4090 24 GB",
    "NVIDIA GeForce RTX 3090": "RTX 3090 24 GB",
    "NVIDIA L4": "L4 24 GB",
}


def counted() -> list[dict[str, Any]]:
    """Rows of work for each shape."""
    meta = torch.device("meta")
    with meta:
        unet = UNet3DConditionModel.from_config(STAGE2_512).eval()
    vae = random_vae(SD_VAE, meta, torch.float32)
    weights = {
        "unet_gb_fp16": gigabytes(unet),
        "vae_gb_fp16": gigabytes(vae),
    }
    rows = []
    for pixels, frames, guided, chunks in SHAPES:
        side, batch = pixels // 8, chunks * (2 if guided else 1)
        with meta:
            sample = torch.empty(batch, 13, frames, side, side)
            audio = torch.empty(batch * frames, 50, 384)
            pictures = torch.empty(2 * frames, 3, pixels, pixels)
            latents = torch.empty(frames, 4, side, side)
        work = by_kind(lambda s=sample, a=audio: unet(s, torch.tensor(1, device=meta), a))
        step = sum(work.values()) / chunks
        encode = sum(by_kind(lambda p=pictures: vae.encode(p).latent_dist.parameters).values())
        decode = sum(by_kind(lambda x=latents: vae.decode(x).sample).values())
        rows.append(
            {
                "kind": "counted",
                "pixels": pixels,
                "frames": frames,
                "guidance": guided,
                "chunks": chunks,
                "unet_step_tflop": round(step, 3),
                "unet_step_tflop_by_kind": {
                    kind: round(part / chunks, 3) for kind, part in work.items()
                },
                "encode_tflop": round(encode, 3),
                "decode_tflop": round(decode, 3),
                "chunk_tflop": round(STEPS * step + encode + decode, 2),
                "chunk_tflop_a_frame": round((STEPS * step + encode + decode) / frames, 3),
                **weights,
            }
        )
        print(rows[-1], flush=True)
    return rows


def by_kind(call: Any) -> dict[str, float]:
    """TFLOP of a call: in linear layers, convolutions and attention."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    kinds = {"addmm": "linear", "mm": "linear", "convolution": "convolution"}
    work: dict[str, float] = {}
    for operation, flops in counter.get_flop_counts()["Global"].items():
        kind = kinds.get(operation.__name__, "attention")
        work[kind] = work.get(kind, 0.0) + flops / 1e12
    return work


def gigabytes(module: torch.nn.Module) -> float:
    """Of the weights in half precision."""
    return round(2 * sum(parameter.numel() for parameter in module.parameters()) / 1e9, 3)


def modelled(measured: Path) -> list[dict[str, Any]]:
    """Rows of other GPUs, by the newest full-size run in half precision of one of `STATED`.

    Args:
        measured: what ``lsync bench`` wrote.

    Raises:
        SystemExit: there is none.
    """
    for section in reversed(json.loads(measured.read_text())["sections"]):
        source = DEVICES.get(section["machine"]["device"], "")
        timed = {row["row"]: row for row in section["rows"] if "frames_per_s" in row}
        usual = {"size": "full", "pixels": 512, "frames": 16, "dtype": "float16", "steps": STEPS}
        if source and section["setting"] == usual and timed.keys() >= set(PRESETS):
            break
    else:
        raise SystemExit(f"{measured} has no run of {', '.join(PRESETS)} on a GPU to model from")
    rows = []
    for gpu, stated in STATED.items():
        ratios = [ours / theirs for ours, theirs in zip(STATED[source], stated, strict=True)]
        rows.append(
            {
                "kind": "modelled",
                "gpu": gpu,
                "measured_on": source,
                "stated_tflops": stated[0],
                "stated_gb_per_s": stated[1],
                "unet_step_ms": spread(timed["exact"]["unet_step_ms"], ratios),
                "frames_per_s": {
                    preset: spread(timed[preset]["frames_per_s"], [1 / ratio for ratio in ratios])
                    for preset in PRESETS
                },
            }
        )
        print(rows[-1], flush=True)
    return rows


def spread(measured: float, factors: list[float]) -> list[float]:
    """The least and the most that a figure becomes."""
    return [round(measured * factor, 1) for factor in (min(factors), max(factors))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measured", type=Path, default=RESULTS / "bench" / "bench.json")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.json")
    arguments = parser.parse_args()
    rows = [*counted(), *modelled(arguments.measured)]
    merge_results(arguments.out, __doc__.splitlines()[0], torch.device("cpu"), rows, KEY)


if __name__ == "__main__":
    main()

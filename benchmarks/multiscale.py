"""What does working on less than the whole picture save: arithmetic, and time on a GPU?

    python benchmarks/multiscale.py flops     # at 512 px, on any machine: nothing is computed
    python benchmarks/multiscale.py decode    # milliseconds of the decoder, on a GPU
    python benchmarks/multiscale.py encode    # the same of the encoder

*flops* counts floating-point operations of the full-size UNet's step with guidance and of the VAE's
encoder (masked and plain faces) and decoder for 16 frames, as they are and with `lip_attention`,
`crop_encode` and `crop_decode`. *decode* and *encode* time decoder and encoder of random weights,
compiled. What both cost in quality is in ``ablation.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, STAGE2_512, measure, merge_results, mouth_mask, relative_error
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode
from vae import SD_VAE, random_vae
from variants import Pipeline

import lsync_compile
from lsync_compile.kernels import lip_attention_reference
from lsync_compile.models.unet import UNet3DConditionModel
from lsync_compile.options import Options
from lsync_compile.passes.crop_decode import CropDecode
from lsync_compile.passes.crop_encode import CropEncode
from lsync_compile.passes.lip_attention import OptimizedLipAttention
from lsync_compile.passes.manager import PassManager
from lsync_compile.passes.spec import Pass
from lsync_compile.runtime.region import make_region, mouth_region

SIDE, FRAMES = 64, 16
OUT = RESULTS / "multiscale.json"
KEY = ("work", "setting")
LIP: dict[str, dict[str, Any]] = {
    "whole": {"lip_attention": False},
    "cells of 2": {"lip_pool": "2"},
    "cells of 4": {"lip_pool": "4"},
}
CROP: dict[str, dict[str, Any]] = {
    "whole": {"crop_decode": False},
    **{kind: {"crop_statistics": kind} for kind in ("own", "first", "both")},
}
ENCODE: dict[str, dict[str, Any]] = {
    "whole": {"crop_encode": False},
    **{f"halo {halo}": {"crop_halo": halo} for halo in (1, 2)},
}


def count(
    module: nn.Module, inputs: tuple[Any, ...], cls: type[Pass], target: str, options: dict
) -> float:
    """TFLOP of a call with one pass, counted on tensors without memory."""
    found: list[float] = []

    def backend(gm: GraphModule, values: list) -> Callable[..., Any]:
        # Tensors without memory are of a device that autocast does not know; nothing else here
        # could keep a pass away.
        spec = replace(cls.spec, after=())
        alone = type("Alone", (cls,), {"spec": spec, "veto": lambda *_: ""})
        settings = Options(**{cls.spec.option: True, **options})
        region = make_region(mouth_mask(SIDE), SIDE)
        PassManager(settings, [alone]).run(gm, target, "graph", region=region)

        for node in gm.graph.nodes:  # the counter does not look into our operations
            if node.target is torch.ops.lsync.lip_attention.default:
                node.target = lip_attention_reference
        gm.recompile()

        def run(*arguments: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                result = gm(*arguments)
            found.append(counter.get_total_flops() / 1e12)
            return result

        return run

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=backend, dynamic=False, fullgraph=True)(*inputs)
    return round(found[0], 3)


def flops() -> list[dict[str, Any]]:
    """Rows of both networks."""
    meta = torch.device("meta")
    with meta:
        unet = UNet3DConditionModel.from_config(STAGE2_512).eval()
        sample = torch.empty(2, 13, FRAMES, SIDE, SIDE)
        audio = torch.empty(2 * FRAMES, 50, 384)
        latents = torch.empty(FRAMES, 4, SIDE, SIDE)
        pictures = torch.empty(2 * FRAMES, 3, 8 * SIDE, 8 * SIDE)
        timestep = torch.tensor(500)
    vae = random_vae(SD_VAE, meta, torch.float32)
    rows = []
    for work, module, inputs, cls, target, settings in (
        ("UNet step", unet, (sample, timestep, audio), OptimizedLipAttention, "unet", LIP),
        ("encode", vae.encoder, (pictures,), CropEncode, "vae.encoder", ENCODE),
        ("decode", vae.decoder, (latents,), CropDecode, "vae.decoder", CROP),
    ):
        for name, options in settings.items():
            tflop = count(module, inputs, cls, target, options)
            rows.append({"work": work, "setting": name, "tflop": tflop})
            print(rows[-1], flush=True)
    return rows


def timed(work: str, device: torch.device, dtype: torch.dtype, runs: int) -> list[dict[str, Any]]:
    """Rows of the compiled encoder or decoder; errors are against the row of the whole."""
    vae = random_vae(SD_VAE, device, dtype)
    latents = torch.randn(FRAMES, 4, SIDE, SIDE, device=device, dtype=dtype)
    plain = torch.rand(FRAMES, 3, 8 * SIDE, 8 * SIDE, device=device, dtype=dtype) * 2 - 1
    mask = mouth_mask(SIDE)
    kept = F.interpolate(mask.reshape(1, 1, *mask.shape[-2:]).float(), size=8 * SIDE)
    pictures = torch.cat([plain * kept.to(plain), plain])
    region = make_region(mask, SIDE)
    settings, option = (CROP, "crop_decode") if work == "decode" else (ENCODE, "crop_encode")
    rows: list[dict[str, Any]] = []
    whole: Tensor | None = None
    for name, options in settings.items():
        torch._dynamo.reset()
        fast = lsync_compile.compile(
            Pipeline(nn.Identity(), vae), preset="exact", **{option: True, **options}
        )
        fast.lsync.settle()

        def call() -> Tensor:
            with torch.no_grad(), mouth_region(region):
                if work == "decode":
                    result: Tensor = vae.decode(latents).sample
                else:
                    result = vae.encode(pictures).latent_dist.mode()
            return result

        try:
            found = call().clone()
            whole = found if whole is None else whole
            timing = measure(call, device, runs=runs)
        finally:
            fast.lsync.undo()
        error = relative_error(found, whole)
        row = {"work": f"{work}, time", "setting": name, "error": round(error, 5)}
        rows.append({**row, **timing.to_dict()})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", choices=("flops", "decode", "encode"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=int, default=10)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.question == "flops":
        rows = flops()
    else:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        rows = timed(arguments.question, device, dtype, arguments.runs)
    merge_results(OUT, __doc__.splitlines()[0], device, rows, KEY)


if __name__ == "__main__":
    main()

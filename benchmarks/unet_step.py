"""What does one UNet step cost: eager, Inductor, lsync?

    python benchmarks/unet_step.py                  # full size, on a GPU
    python benchmarks/unet_step.py --small          # any machine, a check of the script

Random weights and inputs; the full size is LatentSync 1.6's UNet at 512 px (64x64 latents), 16
frames, with guidance as a batch of two and without. Each row holds p20/p50/p80 milliseconds, the
relative error against the float32 UNet in eager mode, the seconds of the first call (compilation)
and the share of the arithmetic ceiling, which is measured in the same run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, STAGE2_512, measure, relative_error, write_results
from torch.utils.flop_counter import FlopCounterMode

import lsync_compile
from lsync_compile.models.unet import UNet3DConditionModel

SMALL = {**STAGE2_512, "sample_size": 16, "block_out_channels": (32, 64, 64, 64)}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "inductor": {"backend": "inductor", "dynamic": False},
    "lsync lowering=eager": {
        "backend": "lsync",
        "options": {"preset": "exact", "lowering": "eager", "strict": True},
    },
    "lsync lowering=inductor": {
        "backend": "lsync",
        "options": {"preset": "exact", "lowering": "inductor", "strict": True},
    },
}


def random_unet(config: dict[str, Any], device: torch.device) -> UNet3DConditionModel:
    """A UNet of ``config`` in float32 whose every layer matters: no zero-initialised ones."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet3DConditionModel.from_config(config)
        for parameter in unet.parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                torch.nn.init.normal_(parameter, std=fan_in**-0.5)
    return unet.eval().requires_grad_(False)


def random_inputs(
    config: dict[str, Any], frames: int, batch: int, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Inputs of one step: latents with conditions, a timestep, 50 audio tokens a frame."""
    generator = torch.Generator(device).manual_seed(1)
    side = config["sample_size"]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return {
        "sample": normal(batch, config["in_channels"], frames, side, side),
        "timestep": torch.tensor(501, device=device),
        "encoder_hidden_states": normal(batch * frames, 50, config["cross_attention_dim"]),
    }


def arithmetic_ceiling(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a square matrix product on random data."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / (measure(lambda: a @ b, device).p50 * 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small widths and latents")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[2, 1],
        choices=[2, 1],
        help="2 with guidance, 1 without; each is a compilation of its own",
    )
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=RESULTS / "unet_step.json")
    arguments = parser.parse_args()

    device = torch.device(arguments.device)
    default_dtype = "float16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, arguments.dtype or default_dtype)
    config = SMALL if arguments.small else STAGE2_512
    ceiling = arithmetic_ceiling(device, dtype, 8192 if device.type == "cuda" else 1024)
    unet = random_unet(config, device)

    exact: dict[int, torch.Tensor] = {}
    flops: dict[int, float] = {}
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        for batch in arguments.batches:
            inputs = random_inputs(config, arguments.frames, batch, device, dtype)
            wide = {
                name: value.float() if value.is_floating_point() else value
                for name, value in inputs.items()
            }
            with FlopCounterMode(display=False) as counter:
                exact[batch] = unet(**wide).sample
            flops[batch] = counter.get_total_flops()
    unet.to(dtype)

    rows: list[dict[str, Any]] = []
    for variant in arguments.variants:
        settings = VARIANTS[variant]
        torch._dynamo.reset()
        call: Callable[..., Any] = unet if settings is None else torch.compile(unet, **settings)
        for batch in arguments.batches:
            inputs = random_inputs(config, arguments.frames, batch, device, dtype)
            with torch.no_grad():
                begin = time.perf_counter()
                output = call(**inputs).sample
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                first = time.perf_counter() - begin
                error = relative_error(output, exact[batch])
                if not error < 0.05:
                    raise SystemExit(f"{variant}: relative error {error:.3g}; not timed")
                timing = measure(lambda call=call, inputs=inputs: call(**inputs), device,
                                 runs=arguments.runs)  # fmt: skip
            rows.append(
                {
                    "variant": variant,
                    "guidance": batch == 2,
                    "dtype": str(dtype).removeprefix("torch."),
                    "latents": config["sample_size"],
                    "frames": arguments.frames,
                    **timing.to_dict(),
                    "relative_error": error,
                    "first_call_seconds": round(first, 2),
                    "tflop": round(flops[batch] / 1e12, 4),
                    "share_of_ceiling": round(flops[batch] / (timing.p50 * 1e-3) / ceiling, 4),
                }
            )
            print(
                f"{variant:26s} guidance {'on ' if batch == 2 else 'off'} "
                f"p50 {timing.p50:8.2f} ms  first {first:6.1f} s  error {error:.2e}",
                flush=True,
            )
        # After each variant: a later one that fails must not cost what was measured.
        write_results(arguments.out, __doc__.splitlines()[0], device, rows)
    print(f"ceiling {ceiling / 1e12:.0f} TFLOP/s, lsync-compile {lsync_compile.__version__}")


if __name__ == "__main__":
    main()

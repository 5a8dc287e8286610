"""How long does compiling take: with empty caches, and again through torch's caches?

    python benchmarks/compile_time.py                        # full-size UNet, on a GPU
    python benchmarks/compile_time.py --parts unet vae       # the VAE's two networks too
    python benchmarks/compile_time.py --small                # any machine, a check of the script

Each row is a process of its own: ``cold`` with an empty TORCHINDUCTOR_CACHE_DIR and
TRITON_CACHE_DIR, ``warm`` with those that the cold one has filled. A row holds the seconds of the
first call (capture, passes, lowering and one run), its parts as the report has them, how many
graphs came from the cache, and the seconds of the second call. The bars are 180 s cold, 15 s warm.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, STAGE2_512, write_results
from torch import nn
from unet_step import SMALL, Steps, random_inputs, random_unet
from vae import SD_VAE, decode, encode, random_vae
from vae import SMALL as SMALL_VAE
from variants import compiled, options_of


def first_call(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compile and run once in this process, whatever the caches hold."""
    device = torch.device(arguments.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    config = SMALL if arguments.small else STAGE2_512
    unet: nn.Module = nn.Identity()
    vae = None
    calls = []
    if "unet" in arguments.parts:
        unet = random_unet(config, device).to(dtype)
        steps = Steps(unet, random_inputs(config, arguments.frames, 2, device, dtype), 2)
        calls.append(steps)
    if "vae" in arguments.parts:
        vae = random_vae(SMALL_VAE if arguments.small else SD_VAE, device, dtype)
        side = 8 * config["sample_size"]
        pixels = torch.zeros(2 * arguments.frames, 3, side, side, device=device, dtype=dtype)
        latents = torch.zeros(arguments.frames, 4, side // 8, side // 8, device=device, dtype=dtype)
        calls += [lambda: encode(vae, pixels), lambda: decode(vae, latents)]

    def run() -> float:
        begin = time.perf_counter()
        with torch.no_grad():
            for call in calls:
                call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return round(time.perf_counter() - begin, 3)

    with compiled(arguments.variant, unet, vae) as handle:
        row: dict[str, Any] = {"first_call_seconds": run(), "second_call_seconds": run()}
        if handle is not None:
            graphs = handle.report().graphs
            row["pass_seconds"] = round(sum(graph.pass_seconds for graph in graphs), 3)
            row["lowering_seconds"] = round(sum(graph.lowering_seconds for graph in graphs), 3)
            row["graphs"] = len(graphs)
            row["from_cache"] = sum(graph.cache_hit for graph in graphs)
            row["captured_before"] = sum(graph.kept for graph in graphs)
    return row


def in_a_process(arguments: argparse.Namespace, caches: Path) -> dict[str, Any]:
    """:func:`first_call` in a new process with these caches.

    Raises:
        SystemExit: the process failed; its own words are on standard error.
    """
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
    }
    command = [sys.executable, __file__, *sys.argv[1:], "--child", "--variant", arguments.variant]
    begin = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arguments.variant}: the process ended with {done.returncode}")
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**row, "process_seconds": round(time.perf_counter() - begin, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small widths and pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--parts", nargs="+", default=["unet"], choices=["unet", "vae"])
    parser.add_argument("--variants", nargs="+", default=["lsync"])
    parser.add_argument("--out", type=Path, default=RESULTS / "compile_time.json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(first_call(arguments)))
        return
    rows: list[dict[str, Any]] = []
    for variant in arguments.variants:
        try:
            options_of(variant)
        except ValueError as error:
            parser.error(str(error))
        arguments.variant = variant
        with tempfile.TemporaryDirectory() as caches:
            for state in ("cold", "warm"):
                row = in_a_process(arguments, Path(caches))
                rows.append({"variant": variant, "parts": arguments.parts, "caches": state, **row})
                print(f"{variant:24s} {state}  first call {row['first_call_seconds']:8.2f} s")
                write_results(
                    arguments.out, __doc__.splitlines()[0], torch.device(arguments.device), rows
                )


if __name__ == "__main__":
    main()

"""What do the kernels need of an H100: registers, spills, shared memory?

    python benchmarks/kernels_sm90.py        # any machine with Triton; no GPU

Compiles every configuration that may run at LatentSync's shapes for compute capability 9.0 and
reads the machine code. ``loads16`` counts loads from device memory of 16 bytes a thread, of
``loads`` in all; ``programs`` is how many one multiprocessor holds at once. Fails on a spill.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write_results
from kernel_cases import cases

from lsync_compile.kernels import registered
from lsync_compile.kernels.launch import Config, Launch, record_launches
from lsync_compile.kernels.linear_geglu_kernels import stream
from lsync_compile.kernels.resources import compile_for
from lsync_compile.kernels.upsample_conv_kernels import spread

# Precisions of the UNet, and float32 at the largest and the widest level.
DTYPES = {torch.float16: (64, 32, 16, 8), torch.bfloat16: (64,), torch.float32: (64, 16)}


def launches() -> Iterator[tuple[str, Launch]]:
    """Every kernel launch of every case, labelled, on tensors without memory."""
    for dtype, sides in DTYPES.items():

        def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        for case in cases():
            if case.side not in sides:
                continue
            with record_launches() as recorded:
                registered()[case.kernel].kernel(*case.arguments(draw))
                if case.kernel == "linear_geglu" and dtype != torch.float32:
                    x, *rest = case.arguments(draw)
                    stream(x.flatten(0, -2), *rest)  # which an H100 chooses by its times
                if case.kernel == "upsample_conv":
                    x, _, bias, _ = case.arguments(draw)
                    spread(x, bias, x.new_empty(x.shape).to(memory_format=torch.channels_last))
            for launch in {each.kernel.name: each for each in recorded}.values():
                yield f"{str(dtype).removeprefix('torch.')} {case.label}", launch


def row(label: str, launch: Launch, config: Config) -> dict[str, Any]:
    """Compile one configuration of a launch and describe the result."""
    resources = compile_for(launch, config)
    loads = re.findall(r"\bLDG\.[A-Z0-9.]*", resources.sass)
    return {
        "kernel": launch.kernel.name,
        "case": label,
        "config": {**config.blocks, "warps": config.warps, "stages": config.stages},
        "registers": resources.registers,
        "spills": resources.spills,
        "shared": resources.shared,
        "programs": resources.programs,
        "loads": len(loads),
        "loads16": sum("128" in load for load in loads),
        "source": source_hash(launch),
    }


def source_hash(launch: Launch) -> str:
    """Changes when the kernel's own text does."""
    return hashlib.sha256(launch.kernel.jitted.src.encode()).hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels_sm90.json")
    arguments = parser.parse_args()
    rows = []
    for label, launch in launches():
        for config in launch.configs:
            rows.append(row(label, launch, config))
            print(*(f"{key}={value}" for key, value in rows[-1].items() if key != "source"))
    write_results(arguments.out, __doc__.splitlines()[0], torch.device("cpu"), rows)
    spilling = [row for row in rows if row["spills"]]
    if spilling:
        raise SystemExit(f"{len(spilling)} of {len(rows)} configurations spill registers")


if __name__ == "__main__":
    main()

"""Do the kernels fit GPUs other than the H100, and how full do they keep a multiprocessor?

    python benchmarks/kernels_elsewhere.py                     # any machine with Triton; no GPU
    python benchmarks/kernels_elsewhere.py --capabilities 89   # RTX 40, L4, L40S

Compiles every configuration that may run at LatentSync's shapes in half precision for each compute
capability and reads the machine code. A configuration is *usable* if it compiles, spills nothing
and leaves room for one program on a multiprocessor; on such a GPU the first call times those that
run. ``programs`` is how many a multiprocessor holds at once of the usable one that keeps most warps
there, ``warps`` how many those are, of ``most_warps``. Fails if a kernel that runs on such a GPU
has none and no library's stands beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, merge_results
from kernels_sm90 import launches, source_hash
from triton.errors import TritonError

from lsync_compile.kernels.fp8_linear import SPEC as FP8_LINEAR
from lsync_compile.kernels.launch import OLDEST, Launch
from lsync_compile.kernels.resources import MULTIPROCESSORS, Resources, compile_for

KEY = ("capability", "kernel", "case")
# What the package does not run elsewhere: see `streams` in linear_geglu_kernels.py.
ONLY = {
    "linear_geglu_stream": (90,),
    "quantise_rows": tuple(
        each for each in MULTIPROCESSORS if divmod(each, 10) >= FP8_LINEAR.capability
    ),
}
# Where ours is timed against the libraries' kernels for the same, and may lose.
BESIDE_LIBRARIES = ("spatial_attention",)


def row(label: str, launch: Launch, capability: int) -> dict[str, Any]:
    """Compile all configurations of a launch and describe what is usable of them."""
    compiled: list[Resources] = []
    failed: list[str] = []
    for config in launch.configs:
        try:
            compiled.append(compile_for(launch, config, capability))
        except (TritonError, RuntimeError) as error:  # its own, and its compiler passes'
            failed.append(str(error).strip().splitlines()[-1])
    usable = [found for found in compiled if found.programs and not found.spills]
    best = max(usable, key=lambda found: found.programs * found.threads, default=None)
    return {
        "capability": capability,
        "kernel": launch.kernel.name,
        "case": label,
        "configurations": len(launch.configs),
        "usable": len(usable),
        "without_room": sum(not found.programs for found in compiled),
        "spilling": sum(found.spills > 0 for found in compiled),
        "most_spills": max((found.spills for found in compiled), default=0),
        "failed": failed[:1],
        "registers": best.registers if best else None,
        "shared": best.shared if best else None,
        "programs": best.programs if best else 0,
        "warps": best.programs * best.threads // 32 if best else 0,
        "most_warps": MULTIPROCESSORS[capability].threads // 32,
        "source": source_hash(launch),
    }


def runs_there(launch: Launch, capability: int) -> bool:
    """Whether the package launches a kernel on GPUs of a capability."""
    return capability in ONLY.get(launch.kernel.name, (capability,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels_elsewhere.json")
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 86, 89, 90, 120])
    arguments = parser.parse_args()
    rows = []
    for capability in arguments.capabilities:
        for label, launch in launches():
            if label.startswith("float16 ") and runs_there(launch, capability):
                rows.append(row(label.removeprefix("float16 "), launch, capability))
                print(*(f"{key}={value}" for key, value in rows[-1].items() if key != "source"))
    merge_results(arguments.out, __doc__.splitlines()[0], torch.device("cpu"), rows, KEY)
    bare = [
        each
        for each in rows
        if divmod(each["capability"], 10) >= OLDEST and each["kernel"] not in BESIDE_LIBRARIES
        if not each["usable"]
    ]
    if bare:
        raise SystemExit(f"{len(bare)} of {len(rows)} launches have no usable configuration")


if __name__ == "__main__":
    main()

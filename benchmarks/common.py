"""What all benchmarks share: timing, the description of the machine, one JSON form of results."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lsync_compile.models.config import LATENTSYNC_UNET

RESULTS = Path(__file__).parent / "results"

# The UNet of LatentSync 1.6 (configs/unet/stage2_512.yaml), 1,267 M parameters.
STAGE2_512: dict[str, Any] = {**LATENTSYNC_UNET, "sample_size": 64}


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: 20th, 50th and 80th percentile over ``runs``."""

    p20: float
    p50: float
    p80: float
    runs: int

    def to_dict(self) -> dict[str, float]:
        """The timing as plain data."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def mouth_mask(side: int) -> torch.Tensor:
    """(1, side, side), 0 where generated: as large, and on as many rows, as the built-in mask.

    A rectangle: the package's own needs a library for pictures, which not every GPU machine has.
    """
    mask = torch.ones(1, side, side)
    mask[:, round(0.365 * side) : round(0.95 * side), round(0.14 * side) : round(0.86 * side)] = 0
    return mask


def measure(
    call: Callable[[], object], device: torch.device, *, warmup: int = 3, runs: int = 20
) -> Timing:
    """Time ``call``: with CUDA events on a GPU, with the wall clock on a CPU."""
    for _ in range(warmup):
        call()
    milliseconds = []
    for _ in range(runs):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            milliseconds.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            call()
            milliseconds.append((time.perf_counter() - start) * 1e3)
    return Timing(*percentiles(milliseconds), runs=runs)


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """The 2-norm of the difference over that of the reference, in float64."""
    output, reference = output.double(), reference.double()
    return float(torch.linalg.vector_norm(output - reference) / torch.linalg.vector_norm(reference))


def largest_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference of an element, in float64."""
    return float((output.double() - reference.double()).abs().max())


def machine(device: torch.device) -> dict[str, str]:
    """Device, versions and date: part of every recorded result."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "diffusers", "lsync-compile"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "device": name or platform.machine(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        **versions,
    }


def recorded(
    path: Path, question: str, device: torch.device, key: Sequence[str]
) -> list[list[Any]]:
    """The ``key`` fields of the rows on file that this machine and these versions wrote."""
    return [[row.get(name) for name in key] for row in _own_rows(path, question, device)]


def merge_results(
    path: Path, question: str, device: torch.device, rows: list[dict], key: Sequence[str]
) -> None:
    """:func:`write_results`, keeping older rows whose ``key`` fields differ from all new ones.

    Rows of another device, other versions or another question are not kept.
    """
    new = [[row.get(name) for name in key] for row in rows]
    old = [
        row
        for row in _own_rows(path, question, device)
        if [row.get(name) for name in key] not in new
    ]
    write_results(path, question, device, old + rows)


def _own_rows(path: Path, question: str, device: torch.device) -> list[dict]:
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    same = {**content["machine"], "date": ""} == {**machine(device), "date": ""}
    return content["rows"] if same and content["question"] == question else []


def write_results(path: Path, question: str, device: torch.device, rows: list[dict]) -> None:
    """Write ``{question, machine, rows}`` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"question": question, "machine": machine(device), "rows": rows}
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"wrote {path}")

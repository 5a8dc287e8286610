"""Cutting and restoring the faces of a chunk: frame by frame, and as a batch on the device.

    python benchmarks/align.py [--device cuda] [--frames 16] [--height 1920 --width 1080]

A row holds the median milliseconds of a chunk, frames a second and, for a batch, the largest
difference in grey levels from what comes out frame by frame. Prints all of it as well.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from common import RESULTS, write_results

from lsync_compile.media.align import FaceAligner, crop_face, restore_face
from lsync_compile.media.align_batch import BatchAligner

ONE_BY_ONE, BATCH = "frame by frame", "batch"


def milliseconds(call: Callable[[], Any], device: torch.device, repeats: int) -> tuple[float, Any]:
    """The median time of a call, after two that warm up, and its result."""
    times = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        result = call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - begin))
    return float(np.median(times[2:])), result


class Chunk:
    """Random frames with a face each near the upper middle, and faces to put there.

    Args:
        arguments: of the command line.
        device: of the faces.
    """

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.side: int = arguments.resolution
        height, width, count = arguments.height, arguments.width, arguments.frames
        draw, aligner = np.random.default_rng(0), FaceAligner(self.side)
        shape = arguments.eyes / 2 * np.array([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        self.frames, self.matrices = [], []
        for _ in range(count):
            noise = draw.normal(128, 400, (height, width, 3)).astype(np.float32)
            self.frames.append(cv2.GaussianBlur(noise, (0, 0), 4).clip(0, 255).astype(np.uint8))
            centre = np.array([width / 2, height / 3]) + draw.uniform(-20, 20, 2)
            self.matrices.append(aligner.matrix(shape + centre))
        self.faces = (2 * torch.rand(count, 3, self.side, self.side) - 1).to(device)

    def crop_each(self) -> Any:
        """The faces of all frames, (f, R, R, 3) uint8."""
        pairs = zip(self.frames, self.matrices, strict=True)
        return np.stack([crop_face(frame, matrix, self.side) for frame, matrix in pairs])

    def restore_each(self) -> list[Any]:
        """Each frame with its face, from the device they were made on."""
        host = self.faces.cpu()
        return [restore_face(*each) for each in zip(self.frames, host, self.matrices, strict=True)]


def most_levels_off(some: Sequence[Any], others: Sequence[Any]) -> int:
    """The largest difference between pictures, in grey levels."""
    pairs = zip(some, others, strict=True)
    return max(int(np.abs(one.astype(int) - other).max()) for one, other in pairs)


def measure(chunk: Chunk, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """A row for each way of both works."""
    batch = BatchAligner(chunk.side, device)
    timed: dict[str, dict[str, Callable[[], Any]]] = {
        "crop": {
            ONE_BY_ONE: chunk.crop_each,
            BATCH: lambda: batch.crop(chunk.frames, chunk.matrices),
        },
        "restore": {
            ONE_BY_ONE: chunk.restore_each,
            BATCH: lambda: batch.restore(chunk.frames, chunk.faces, chunk.matrices),
        },
    }
    rows = []
    for work, ways in timed.items():
        results = {}
        for way, call in ways.items():
            spent, results[way] = milliseconds(call, device, repeats)
            row = {"work": f"{work}, {way}", "ms": round(spent, 2)}
            rows.append({**row, "frames_per_s": round(1000 * len(chunk.frames) / spent, 1)})
        if work == "crop":  # (f, 3, R, R) on the device
            results[BATCH] = results[BATCH].permute(0, 2, 3, 1).cpu().numpy()
        rows[-1]["most_levels_off"] = most_levels_off(results[BATCH], results[ONE_BY_ONE])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--height", type=int, default=1920)
    parser.add_argument("--width", type=int, default=1080)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--eyes", type=float, default=119.0, help="distance of the brows, pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "align.json")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    size = ("frames", "height", "width", "resolution")
    about = {name: getattr(arguments, name) for name in size}
    found = measure(Chunk(arguments, device), device, arguments.repeats)
    rows = [{**row, **about} for row in found]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    error = {
        row["work"].partition(",")[0]: row["most_levels_off"]
        for row in rows
        if "most_levels_off" in row
    }
    print(
        json.dumps(
            {"device": name, "torch": torch.__version__, "rows": rows, "most_levels_off": error},
            indent=1,
        )
    )
    write_results(arguments.out, __doc__.splitlines()[0], device, rows)


if __name__ == "__main__":
    main()

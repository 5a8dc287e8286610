"""Cutting and restoring the faces of a chunk: frame by frame, and as a batch on the device.

    python benchmarks/align.py [--device cuda] [--frames 16] [--height 1920 --width 1080]

Prints frames a second and the largest difference in grey levels between the two.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch

from lsync_compile.media.align import FaceAligner, crop_face, restore_face
from lsync_compile.media.align_batch import BatchAligner


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--height", type=int, default=1920)
    parser.add_argument("--width", type=int, default=1080)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--eyes", type=float, default=119.0, help="distance of the brows, pixels")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device, side, count = torch.device(arguments.device), arguments.resolution, arguments.frames
    draw = np.random.default_rng(0)
    frames, matrices, aligner = [], [], FaceAligner(side)
    shape = arguments.eyes / 2 * np.array([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    for _ in range(count):
        noise = draw.normal(128, 400, (arguments.height, arguments.width, 3)).astype(np.float32)
        frames.append(cv2.GaussianBlur(noise, (0, 0), 4).clip(0, 255).astype(np.uint8))
        centre = np.array([arguments.width / 2, arguments.height / 3]) + draw.uniform(-20, 20, 2)
        matrices.append(aligner.matrix(shape + centre))
    faces = (2 * torch.rand(count, 3, side, side) - 1).to(device)
    batch = BatchAligner(side, device)

    def restore_each() -> list[Any]:
        host = faces.cpu()
        return [restore_face(*each) for each in zip(frames, host, matrices, strict=True)]

    timed = {
        "crop, frame by frame": lambda: np.stack(
            [crop_face(frame, matrix, side) for frame, matrix in zip(frames, matrices, strict=True)]
        ),
        "crop, batch": lambda: batch.crop(frames, matrices),
        "restore, frame by frame": restore_each,
        "restore, batch": lambda: batch.restore(frames, faces, matrices),
    }
    rows, results = [], {}
    for name, call in timed.items():
        spent, results[name] = milliseconds(call, device, arguments.repeats)
        row = {"work": name, "ms": round(spent, 2), "frames_per_s": round(1000 * count / spent, 1)}
        rows.append(row)
    cut = results["crop, batch"].permute(0, 2, 3, 1).cpu().numpy().astype(int)
    error = {
        "crop": int(np.abs(cut - results["crop, frame by frame"]).max()),
        "restore": max(
            int(np.abs(one.astype(int) - other).max())
            for one, other in zip(
                results["restore, batch"], results["restore, frame by frame"], strict=True
            )
        ),
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(
        json.dumps(
            {"device": name, "torch": torch.__version__, "rows": rows, "most_levels_off": error},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()

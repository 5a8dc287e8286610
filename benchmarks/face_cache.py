"""What the face cache spares and what it costs in landmark pixels, on a clip.

    python benchmarks/face_cache.py CLIP [--frames 100] [--still]

Each setting runs over the same frames; the reference is a search of every frame. The last row is
the detector's own noise: the careful look started from the face of the frame before.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator
from itertools import islice

import cv2
import numpy as np

from lsync_compile.media.faces import Face, FaceDetector, Frame
from lsync_compile.media.mtcnn import MtcnnDetector
from lsync_compile.media.video import read_frames
from lsync_compile.runtime.face_cache import CachedFaceDetector, landmark_error

SETTINGS: dict[str, dict[str, float | bool | int]] = {
    "exact hits": {},
    "near 0.5 px": {"tolerance": 0.5},
    "near 1 px": {"tolerance": 1.0},
    "near 2 px": {"tolerance": 2.0},
    "tracking": {"tracking": True},
    "tracking, near 1 px": {"tracking": True, "tolerance": 1.0},
}


def frames_of(path: str, count: int, still: bool) -> list[Frame]:
    """Frames of a clip, or its first one with the noise of a camera, as a still film has."""
    frames = list(islice(read_frames(path), count))
    if not still:
        return frames
    draw = np.random.default_rng(0)
    first = frames[0].astype(np.int16)
    return [
        (first + draw.integers(-2, 3, first.shape, dtype=np.int8)).clip(0, 255).astype(np.uint8)
        for _ in range(min(count, 40))
    ]


def faces_of(detector: FaceDetector, frames: list[Frame]) -> Iterator[tuple[Face | None, float]]:
    for frame in frames:
        begin = time.perf_counter()
        face = detector.detect(frame)
        yield face, 1000 * (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clip")
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--still", action="store_true", help="the first frame, with noise")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    frames = frames_of(arguments.clip, arguments.frames, arguments.still)
    detector = MtcnnDetector()
    reference, spent = zip(*faces_of(detector, frames), strict=True)
    rows = [{"setting": "search", "ms": round(statistics.mean(spent), 2)}]
    for name, setting in SETTINGS.items():
        cached = CachedFaceDetector(detector, **setting)  # type: ignore[arg-type]
        found, spent = zip(*faces_of(cached, frames), strict=True)
        errors = [
            landmark_error(one, other)
            for one, other in zip(found, reference, strict=True)
            if one is not None and other is not None
        ]
        p50, p95, worst = np.percentile(errors, [50, 95, 100]).round(2).tolist()
        rows.append(
            {
                "setting": name,
                "ms": round(statistics.mean(spent), 2),
                **cached.counts.to_dict(),
                "error_px": {"p50": p50, "p95": p95, "max": worst},
            }
        )
    machine = {"cpu": platform.machine(), "opencv": cv2.__version__, "threads": 1}
    print(json.dumps({"clip": arguments.clip, "machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

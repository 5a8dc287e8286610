"""What a frame costs outside the networks: reading, finding the face, cutting, pasting, writing.

    python benchmarks/frames.py --clip CLIP.mp4 [--frames 48]

Milliseconds a frame, one kind of work after the other: by the clock, and of processor time in all
threads. In a run they overlap, each in a thread of its own, so the slowest by the clock sets the
limit: 40 ms are 25 frames a second. Cutting and pasting are those of a CPU, frame by frame;
``align.py`` measures them in batches on a device.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, merge_results
from memory import SAMPLE

from lsync_compile.cores import usable_cores
from lsync_compile.media.align import FaceAligner, crop_face, restore_face
from lsync_compile.media.mtcnn import MtcnnDetector
from lsync_compile.media.video import probe, read_frames
from lsync_compile.media.writer import VideoWriter

KEY = ("work", "clip", "cores")
CHUNK = 16


def timed(call: Callable[[], Any], frames: int) -> tuple[dict[str, float], Any]:
    """Milliseconds a frame, and the call's result."""
    clock, processor = time.perf_counter(), time.process_time()
    result = call()
    spent = {
        "ms": 1000 * (time.perf_counter() - clock) / frames,
        "processor_ms": 1000 * (time.process_time() - processor) / frames,
    }
    return {name: round(value, 1) for name, value in spent.items()}, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip", type=Path, default=SAMPLE / "talking.mp4")
    parser.add_argument("--frames", type=int, default=48)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--out", type=Path, default=RESULTS / "frames.json")
    arguments = parser.parse_args()
    info, side = probe(arguments.clip), arguments.resolution
    cores = usable_cores()
    rows: list[dict[str, Any]] = []

    def record(work: str, call: Callable[[], Any]) -> Any:
        spent, result = timed(call, count)
        size = f"{info.width}x{info.height}"
        labels = {"work": work, "clip": arguments.clip.name, "cores": cores, "size": size}
        rows.append({**labels, **spent})
        print(f"{work:24s} {spent['ms']:7.1f} ms  {spent['processor_ms']:7.1f} ms of a core")
        return result

    count = arguments.frames
    frames = record("read", lambda: list(islice(read_frames(arguments.clip), count)))
    if len(frames) < count:
        raise SystemExit(f"{arguments.clip} has {len(frames)} frames; give --frames {len(frames)}")
    detector = MtcnnDetector()
    detector.detect_all(frames[:CHUNK])  # loads the networks of all that work side by side
    alone = record("find, one by one", lambda: [detector.detect(frame) for frame in frames])
    chunks = [frames[start : start + CHUNK] for start in range(0, count, CHUNK)]
    record("find, side by side", lambda: [detector.detect_all(chunk) for chunk in chunks])
    aligner = FaceAligner(side)
    found = [(frame, face) for frame, face in zip(frames, alone, strict=True) if face is not None]
    places = [(frame, aligner.matrix(face.landmarks)) for frame, face in found]
    count = len(places)
    faces = record("cut", lambda: [crop_face(frame, matrix, side) for frame, matrix in places])
    shown = [torch.from_numpy(face).permute(2, 0, 1).float() / 127.5 - 1 for face in faces]

    def paste() -> list[Any]:
        pairs = zip(places, shown, strict=True)
        return [restore_face(frame, face, matrix) for (frame, matrix), face in pairs]

    finished = record("paste", paste)
    with tempfile.TemporaryDirectory() as folder:

        def write() -> None:
            path = Path(folder) / "out.mp4"
            with VideoWriter(path, info.width, info.height, colour=info.colour) as writer:
                for frame in finished:
                    writer.write(frame)

        record("write", write)
    merge_results(arguments.out, __doc__.splitlines()[0], torch.device("cpu"), rows, KEY)


if __name__ == "__main__":
    main()

"""Does memory grow with the length of the clip?

    python benchmarks/memory.py [--clip CLIP --speech WAV] [--times 8] [--steps 1]

Syncs a clip, and the same clip and speech repeated, each in a process of its own through the
``lsync`` command line, and records the resident memory of each: its peak, and its mean over each
quarter of the run, which shows a growth that the noise of a peak would hide. On a GPU the report's
peak device memory is recorded too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, write_results

import lsync_compile
from lsync_compile.media.audio import load_audio
from lsync_compile.media.video import probe, read_frames
from lsync_compile.media.writer import VideoWriter

SAMPLE = Path(lsync_compile.__file__).parent / "assets" / "sample"


def repeat(clip: Path, speech: Path, times: int, folder: Path) -> Path:
    """Write the clip ``times`` times over, with the speech as its sound track."""
    info = probe(clip)
    path = folder / f"{times}.mp4"
    sound = np.tile(load_audio(speech), times)
    with VideoWriter(path, info.width, info.height, audio=sound) as writer:
        for _ in range(times):
            for frame in read_frames(clip):
                writer.write(frame)
    return path


def sync(clip: Path, steps: int, folder: Path) -> dict[str, Any]:
    """Sync a clip to its own sound in a new process; frames and peak memory."""
    command = [
        sys.executable, "-m", "lsync_compile.cli", "sync", str(clip),
        "-o", str(folder / "out.mp4"), "--steps", str(steps), "--json",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    samples: list[float] = []
    watcher = threading.Thread(target=watch, args=(process.pid, samples))
    watcher.start()
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    watcher.join()
    if status:
        raise SystemExit(f"lsync sync failed on {clip}")
    summary = json.loads(text)
    return {
        "frames": summary["frames"],
        "seconds": summary["seconds"],
        "peak_resident_mib": round(usage.ru_maxrss / 1024, 1),
        "mean_resident_mib_by_quarter": [
            round(statistics.mean(part)) for part in quarters(samples)
        ],
        "peak_device_mib": summary["peak_device_mib"],
    }


def watch(pid: int, samples: list[float], every: float = 0.2) -> None:
    """Append the resident memory of a process in MiB until it is gone (Linux)."""
    page = os.sysconf("SC_PAGE_SIZE") / 2**20
    statistics_file = Path(f"/proc/{pid}/statm")
    while True:
        try:
            resident = int(statistics_file.read_text().split()[1])
        except (OSError, IndexError):
            return
        if resident == 0:  # ended, not yet waited for
            return
        samples.append(resident * page)
        time.sleep(every)


def quarters(samples: list[float]) -> list[list[float]]:
    """Four equal parts, in order."""
    edges = [round(len(samples) * part / 4) for part in range(5)]
    return [samples[begin:end] for begin, end in itertools.pairwise(edges)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip", type=Path, default=SAMPLE / "talking.mp4")
    parser.add_argument("--speech", type=Path, default=SAMPLE / "speech.wav")
    parser.add_argument("--times", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.json")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for times in (1, arguments.times):
            clip = repeat(arguments.clip, arguments.speech, times, folder)
            row = {"times": times, "steps": arguments.steps, **sync(clip, arguments.steps, folder)}
            rows.append(row)
            print(row, flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_results(arguments.out, __doc__.splitlines()[0], device, rows)


if __name__ == "__main__":
    main()

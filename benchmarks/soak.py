"""Does a process that syncs many short clips grow from clip to clip?

    python benchmarks/soak.py                                 # small networks, minutes on a CPU
    python benchmarks/soak.py --model mini --lowering inductor                 # on a GPU
    python benchmarks/soak.py --with parallel_stages=on clip_cache=True

Cuts ``--kinds`` short clips of one to three chunks out of a clip and syncs them in turns until
``--chunks`` are done, in one process with one compiled pipeline, file to file. A row holds the
resident memory after each job, its mean over each quarter and what is reserved of a GPU;
``as_it_is`` is what the system shows, the rest is after glibc has given back what is free (it keeps
free memory for each thread, less with MALLOC_ARENA_MAX=2). The first quarter warms up; the script
fails where the last one is more than ``--most`` MiB above the second. What is on file of this
machine and these versions is not measured again, but for ``--again``. A run that takes longer than
``--seconds`` is given up: memory of half a run says nothing of the rest.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, merge_results, recorded
from memory import SAMPLE, quarters
from pipeline import make_pipeline, parse_setting

import lsync_compile
from lsync_compile.bench.networks import random_unet, random_vae
from lsync_compile.bench.sizes import SMALL_UNET, SMALL_VAE
from lsync_compile.cores import usable_cores
from lsync_compile.media.audio import load_audio
from lsync_compile.media.video import probe, read_frames
from lsync_compile.media.writer import VideoWriter
from lsync_compile.models.mel_encoder import MelAudioEncoder
from lsync_compile.models.pipeline import LatentSyncPipeline
from lsync_compile.models.scheduler import default_scheduler

KEY = ("model", "lowering", "more", "chunks")
CHUNK, FPS, RATE = 4, 25, 16000


def small_pipeline(device: torch.device, dtype: torch.dtype) -> Any:
    """Random networks of small widths at 128 px: a job takes a fraction of a second."""
    unet = random_unet(dict(SMALL_UNET), device).to(dtype)
    vae = random_vae(dict(SMALL_VAE), device, dtype)
    return LatentSyncPipeline(vae, MelAudioEncoder().eval(), unet, default_scheduler()).to(device)


def cut(clip: Path, speech: Path, kinds: int, folder: Path, chunk: int = CHUNK) -> list[Path]:
    """Short clips with sound: a chunk of frames, two, three, one and so on, from other places."""
    info, sound = probe(clip), load_audio(speech)
    paths = []
    for kind in range(kinds):
        count = chunk * (1 + kind % 3)
        path = folder / f"{kind}.mp4"
        samples = np.roll(sound, -1000 * kind)[: count * RATE // FPS]
        with VideoWriter(path, info.width, info.height, audio=samples) as writer:
            for frame in islice(read_frames(clip, start=2 * kind), count):
                writer.write(frame)
        paths.append(path)
    return paths


def resident() -> float:
    """This process's resident memory in MiB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def give_back() -> None:
    """Free what Python can free, and have glibc return what is free to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def growth(samples: list[float]) -> float:
    """Mean of the last quarter less that of the second, in MiB."""
    _, second, _, last = quarters(samples)
    return statistics.mean(last) - statistics.mean(second)


def soak(
    pipeline: Any, clips: list[Path], chunks: int, folder: Path, seconds: float | None = None
) -> dict[str, Any]:
    """Sync the clips in turns until so many chunks are done, or the time is up; memory by job."""
    samples, shown, reserved, began = [], [], [], time.perf_counter()
    done, clip = 0, itertools.cycle(clips)
    while done < chunks:
        if seconds is not None and time.perf_counter() - began > seconds:
            raise SystemExit(f"{done} of {chunks} chunks in {seconds:g} s: nothing was recorded")
        path = next(clip)
        result = pipeline(
            path,
            None,
            folder / "out.mp4",
            num_frames=CHUNK,
            num_inference_steps=1,
            generator=torch.Generator(pipeline.device).manual_seed(0),
            progress=lambda done, total: None,
        )
        if result.num_frames % CHUNK:
            raise SystemExit(f"{path}: {result.num_frames} frames came out")
        done += result.num_frames // CHUNK
        shown.append(resident())
        give_back()
        samples.append(resident())
        if pipeline.device.type == "cuda":
            reserved.append(torch.cuda.memory_reserved(pipeline.device) / 2**20)
    return {
        "jobs": len(samples),
        "seconds": round(time.perf_counter() - began, 1),
        "grown_mib": round(growth(samples), 2),
        "mean_resident_mib_by_quarter": [round(statistics.mean(q), 1) for q in quarters(samples)],
        "as_it_is": [round(statistics.mean(q), 1) for q in quarters(shown)],
        "resident_mib": [round(each, 1) for each in samples],
        "reserved_device_mib": sorted({round(each) for each in reserved}) or None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip", type=Path, default=SAMPLE / "talking.mp4")
    parser.add_argument("--speech", type=Path, default=SAMPLE / "speech.wav")
    parser.add_argument("--model", default="small", help="small or full (random), mini, a folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lowering", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--with", nargs="+", default=[], dest="more", metavar="NAME=VALUE")
    parser.add_argument("--chunks", type=int, default=500, help="of 4 frames, at least 8")
    parser.add_argument("--seconds", type=float, help="of soaking at most")
    parser.add_argument("--again", action="store_true", help="measure what is on file too")
    parser.add_argument("--kinds", type=int, default=6, help="different clips")
    parser.add_argument("--most", type=float, default=16.0, help="MiB that the process may grow")
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    options, _ = parse_setting("exact", [*arguments.more, f"lowering={arguments.lowering}"])
    labels = {
        "model": arguments.model,
        "lowering": arguments.lowering,
        "more": " ".join(arguments.more),
        "chunks": arguments.chunks,
    }
    question = __doc__.splitlines()[0]
    if not arguments.again and list(labels.values()) in recorded(
        arguments.out, question, device, KEY
    ):
        print(f"on file: {labels}")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LSYNC_CACHE"] = str(folder / "cache")
        clips = cut(arguments.clip, arguments.speech, arguments.kinds, folder)
        small = arguments.model == "small"
        plain = (
            small_pipeline(device, dtype)
            if small
            else make_pipeline(arguments.model, device, dtype)
        )
        fast = lsync_compile.compile(plain, **options)
        row = {
            **labels,
            "cores": usable_cores(),
            **soak(fast, clips, arguments.chunks, folder, arguments.seconds),
            "graphs": len(fast.lsync.report().graphs),
        }
    print(json.dumps({name: value for name, value in row.items() if name != "resident_mib"}))
    merge_results(arguments.out, question, device, [row], KEY)
    if row["grown_mib"] > arguments.most:
        raise SystemExit(f"the process grew by {row['grown_mib']} MiB, more than {arguments.most}")


if __name__ == "__main__":
    main()

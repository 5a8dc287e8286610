"""What do speculation and shared calls do to the time of the first frame and of all?

    python benchmarks/speculation.py                              # the bundled model and clip
    python benchmarks/speculation.py --checkpoint FOLDER --device cuda --frames 16 --chunks 8

Runs the clip by the plain networks (nothing is compiled), chunk by chunk, in pairs, in pairs with
speculation, and with ``temporal_start="path"`` at about as many steps. A row has the seconds until
the first picture and until all are there, by the clock and of the processor (which other work on a
machine disturbs less), the chunks' denoising steps that were computed, the mouth PSNR of the worst
chunk against the plain run, and what the report counted. Rows are written as they
come: a call with ``--seconds`` starts none after these, and the same call again goes on.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, merge_results, recorded

import lsync_compile
from lsync_compile.models.pipeline import LatentSyncPipeline
from lsync_compile.options import resolve_options
from lsync_compile.report import Session
from lsync_compile.runtime.guard import mouth_psnr
from lsync_compile.runtime.running import running

QUESTION = __doc__.splitlines()[0]
KEY = ("way", "checkpoint", "clip", "frames", "chunks", "steps")
SAMPLE = Path(lsync_compile.__file__).parent / "assets" / "sample"
WAYS: dict[str, dict[str, Any]] = {
    "one by one": {},
    "pairs": {"batch_chunks": 2},
    "pairs, speculated": {"batch_chunks": 2, "speculate": True},
    "path": {"temporal_start": "path", "temporal_strength": 0.6},
    "path, pairs": {"temporal_start": "path", "temporal_strength": 0.6, "batch_chunks": 2},
}


def run(
    pipeline: LatentSyncPipeline, options: dict[str, Any], arguments: argparse.Namespace
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """A row's figures and the generated faces of each chunk."""
    session = Session("speculation", resolve_options("exact", options))
    samples = 0

    def count(module: Any, args: tuple[Any, ...]) -> None:
        nonlocal samples
        samples += len(args[0]) // 2  # with guidance

    hook = pipeline.unet.register_forward_pre_hook(count)
    faces, first, first_cpu = [], 0.0, 0.0
    begin, begin_cpu = time.perf_counter(), time.process_time()
    try:
        with running(session):
            for result in pipeline.synthesize(
                arguments.video,
                arguments.audio,
                num_frames=arguments.frames,
                num_inference_steps=arguments.steps,
                max_frames=arguments.frames * arguments.chunks,
                generator=torch.Generator(pipeline.device).manual_seed(0),
                progress=lambda done, total: None,
            ):
                if not faces:
                    first = time.perf_counter() - begin
                    first_cpu = time.process_time() - begin_cpu
                assert result.synced is not None
                faces.append(result.synced.cpu())
    finally:
        hook.remove()
    seconds, seconds_cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    features = session.report().features
    counted = {
        name: features[name]
        for name in ("batching", "speculation", "temporal_start")
        if name in features
    }
    return {
        "first_frame_s": round(first, 2),
        "all_frames_s": round(seconds, 2),
        "first_frame_cpu_s": round(first_cpu, 2),
        "all_frames_cpu_s": round(seconds_cpu, 2),
        "steps_computed": samples,
        "counted": counted,
    }, faces


def main() -> None:
    """Measure the ways that are not on file yet, each after the plain one."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--checkpoint", default="mini")
    parser.add_argument("--video", type=Path, default=SAMPLE / "talking.mp4")
    parser.add_argument("--audio", type=Path, default=SAMPLE / "speech.wav")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frames", type=int, default=8, help="a chunk")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS))
    parser.add_argument("--seconds", type=float, default=140, help="start no row after these")
    parser.add_argument("--out", type=Path)
    arguments, start = parser.parse_args(), time.monotonic()
    device = torch.device(arguments.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    out = arguments.out or RESULTS / f"speculation.{device.type}.json"
    common = {
        "checkpoint": Path(arguments.checkpoint).name,
        "clip": arguments.video.name,
        "frames": arguments.frames,
        "chunks": arguments.chunks,
        "steps": arguments.steps,
    }
    done = recorded(out, QUESTION, device, KEY)
    wanted = [way for way in arguments.ways if [way, *common.values()] not in done]
    if not wanted:
        return
    pipeline = LatentSyncPipeline.from_pretrained(
        arguments.checkpoint, torch_dtype=dtype, device=device
    )
    plain, reference = run(pipeline, {}, arguments)
    for way in wanted:
        if time.monotonic() - start > arguments.seconds:
            raise SystemExit("out of seconds; the same call again goes on from here")
        row, faces = run(pipeline, WAYS[way], arguments) if WAYS[way] else (plain, reference)
        mask = pipeline.mask
        worst = min(mouth_psnr(*pair, mask) for pair in zip(faces, reference, strict=True))
        merge_results(
            out, QUESTION, device, [{"way": way, **common, **row, "mouth_psnr": worst}], KEY
        )
        print(f"{way}: {row}, {worst:.1f} dB", flush=True)


if __name__ == "__main__":
    main()

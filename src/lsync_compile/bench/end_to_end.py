"""How fast a row is from the clip to the finished file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

import lsync_compile
from lsync_compile.bench.engines import Networks, running_with
from lsync_compile.bench.rows import LSYNC, Row
from lsync_compile.models.checkpoint import load_audio_encoder, resolve_checkpoint
from lsync_compile.models.scheduler import default_scheduler
from lsync_compile.models.unet import UNet3DConditionModel

WARM = 3  # chunks that compile, capture, and know the one before


def make_pipeline(networks: Networks) -> Any:
    """The networks as a pipeline, with the bundled model's ear."""
    assert isinstance(networks.unet, UNet3DConditionModel)
    pipeline = lsync_compile.LatentSyncPipeline(
        networks.vae,
        load_audio_encoder(resolve_checkpoint("mini")),
        networks.unet,
        default_scheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(networks.unet.device)


def measure_job(
    row: Row,
    networks: Networks,
    clip: Path,
    audio: Path | None,
    *,
    frames: int,
    all_frames: int,
    steps: int,
    trace: Path | None = None,
) -> dict[str, Any]:
    """Sync a clip to a file twice, a few chunks to warm up and then all, and time the second.

    Args:
        row: of the engines that take a whole pipeline.
        networks: what runs.
        clip, audio: real ones; faces are found in them.
        frames: a chunk.
        all_frames: of the job.
        steps: of the plain run; 20 but for a check of the command.
        trace: where the timeline goes, for lsync.

    Raises:
        LsyncError: whatever the pipeline raises.
    """
    pipeline = make_pipeline(networks)
    device = networks.unet.device
    if row.engine == LSYNC:
        pipeline = lsync_compile.compile(pipeline, **(row.options or {}), trace=trace)
        return _timed(pipeline, row, device, clip, audio, frames, all_frames, steps)
    with running_with(row, networks):
        return _timed(pipeline, row, device, clip, audio, frames, all_frames, steps)


def _timed(
    pipeline: Any,
    row: Row,
    device: torch.device,
    clip: Path,
    audio: Path | None,
    frames: int,
    all_frames: int,
    steps: int,
) -> dict[str, Any]:
    from lsync_compile.quality.runs import Setting, solver

    handle = getattr(pipeline, "lsync", None)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="lsync-bench-") as folder,
            solver(pipeline, Setting(row.name, solver=row.solver)),
        ):
            for count in (min(WARM * frames, all_frames), all_frames):
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                done = pipeline(
                    clip,
                    audio,
                    Path(folder) / "out.mp4",
                    num_frames=frames,
                    max_frames=count,
                    num_inference_steps=row.part_of(steps),
                    generator=torch.Generator().manual_seed(0),
                )
        peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
        report = None if handle is None else handle.report()
    finally:
        if handle is not None:
            handle.undo()
    return {
        "frames_per_s": round(done.num_frames / done.seconds, 3),
        "frames": done.num_frames,
        "seconds": round(done.seconds, 3),
        "peak_mib": None if peak is None else round(peak, 1),
        "stage_seconds": {}
        if report is None
        else {name: round(each.seconds, 3) for name, each in report.times.items()},
    }

"""``lsync calibrate``: which steps must compute deep features, for a checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lsync_compile.bars import progress_bars
from lsync_compile.cli_options import (
    AsJson,
    Checkpoint,
    Detector,
    DetectorName,
    Device,
    LoweringName,
    Quiet,
    lowering_on,
)


class Predictor(str, Enum):
    """What stands for deep features that are not computed."""

    reuse = "reuse"
    linear = "linear"
    quadratic = "quadratic"


def calibrate(
    video: Annotated[Path, typer.Argument(help="Clip with one talking face.")],
    audio: Annotated[
        Path | None, typer.Argument(help="Speech to sync to; the clip's own if left out.")
    ] = None,
    checkpoint: Checkpoint = "mini",
    steps: Annotated[int, typer.Option(min=2, max=1000, help="Denoising steps a chunk.")] = 20,
    floor: Annotated[
        float, typer.Option(help="Least mouth PSNR in dB against computing every step.")
    ] = 40.0,
    branch: Annotated[int, typer.Option(min=0, help="As the option deep_cache_branch.")] = 0,
    predictor: Annotated[
        Predictor, typer.Option(help="As the option deep_cache_predictor.")
    ] = Predictor.linear,
    max_frames: Annotated[int, typer.Option(min=1, help="Of the clip; 32 are two chunks.")] = 32,
    lowering: LoweringName = None,
    device: Device = None,
    detector: DetectorName = Detector.mtcnn,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Find the fewest steps that must compute deep features, and keep the answer.

    Runs the clip several times. The answer is filed under the checkpoint's weights in the user's
    cache folder, for runs with deep_cache_schedule=calibrated.
    """
    from lsync_compile.devices import choose_device
    from lsync_compile.loading import load_plain
    from lsync_compile.quality.calibrate import calibrate as find
    from lsync_compile.quality.compare import Clip
    from lsync_compile.runtime.calibration import save_calibration

    place = choose_device(device)
    console = Console(stderr=True, quiet=quiet or as_json)
    with console.status(f"Loading {checkpoint} on {place} …"):
        pipeline = load_plain(checkpoint, place, detector=detector.value)
    chosen = lowering_on(place, lowering)
    with progress_bars(console) as bar:
        found = find(
            pipeline,
            Clip(video, audio),
            steps=steps,
            floor=floor,
            branch=branch,
            predictor=predictor.value,
            max_frames=max_frames,
            options={"lowering": chosen},
            progress=bar,
        )
    path = save_calibration(pipeline.unet, found)
    if as_json:
        typer.echo(json.dumps({**asdict(found), "file": str(path)}, indent=2))
    elif not quiet:
        computed = ", ".join(map(str, found.computed))
        typer.echo(
            f"{len(found.computed)} of {found.steps} steps compute deep features ({computed}): "
            f"mouth PSNR {found.mouth_psnr:.2f} dB on {found.frames} frames of {found.clip}\n{path}"
        )

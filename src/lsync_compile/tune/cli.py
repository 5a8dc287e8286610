"""``lsync tune``: the fastest options that are good enough, on the user's machine and clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lsync_compile.bars import progress_bars
from lsync_compile.cli_options import (
    UNFINISHED,
    AsJson,
    Checkpoint,
    ChunkFrames,
    Detector,
    DetectorName,
    Device,
    LoweringName,
    NumberFormat,
    Quiet,
    lowering_on,
)
from lsync_compile.errors import MediaError
from lsync_compile.tune.search import TOLERANCE

TOO_SLOW = 1
MIN_CHUNKS = 3


def tune(
    video: Annotated[Path, typer.Argument(help="Clip with one talking face.")],
    audio: Annotated[
        Path | None, typer.Argument(help="Speech to sync to; the clip's own if left out.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File for `lsync sync --config`.")
    ] = Path("lsync.json"),
    min_psnr: Annotated[
        float, typer.Option(help="Least PSNR of the mouth against the unoptimised run, dB.")
    ] = 36.0,
    min_fps: Annotated[
        float | None, typer.Option(help="Leave with code 1 where the answer is slower than this.")
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(min=0.0, max=0.5, help="Share of the speed to give away for quality."),
    ] = TOLERANCE,
    seconds: Annotated[
        float | None,
        typer.Option(min=0.0, help="Start no trial that would end later; the same call goes on."),
    ] = None,
    checkpoint: Checkpoint = "mini",
    max_frames: Annotated[
        int, typer.Option(min=1, help="Of the clip, to choose by; at least three chunks tell most.")
    ] = 64,
    held_out: Annotated[
        int, typer.Option(min=0, help="Frames after those, to confirm the choice on; 0: none.")
    ] = 32,
    num_frames: ChunkFrames = 16,
    steps: Annotated[
        int, typer.Option(min=2, max=1000, help="Denoising steps of the unoptimised run.")
    ] = 20,
    lowering: LoweringName = None,
    detector: DetectorName = Detector.mtcnn,
    device: Device = None,
    dtype: NumberFormat = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure options on a clip and write the fastest ones that stay above the floor.

    Runs the clip once as it is and once for each candidate, from careful to bold: fewer steps, the
    path of the chunk before, the decoder's crop, lip attention, deep features. Of what is about as
    fast as the fastest, the best in quality is chosen, and confirmed on frames that it was not
    chosen by. What is written is good for this clip's kind, this checkpoint and this machine;
    `lsync sync --config` says where it is used with others, and `--guard-every` watches it.
    """
    from dataclasses import asdict

    from lsync_compile.devices import choose_device
    from lsync_compile.loading import load_plain
    from lsync_compile.quality.compare import Clip, describe_machine
    from lsync_compile.runtime.clip_cache import clip_key
    from lsync_compile.tune.configuration import conditions_of, write_configuration
    from lsync_compile.tune.kept import KeptTrials
    from lsync_compile.tune.measuring import Bench
    from lsync_compile.tune.report import print_answer, to_dict
    from lsync_compile.tune.search import Budget, groups
    from lsync_compile.tune.tuning import tune_on

    if not output.parent.is_dir():
        raise MediaError(f"{output}: the folder {output.parent} does not exist")
    place = choose_device(device)
    console = Console(stderr=True, quiet=quiet or as_json)
    with console.status(f"Loading {checkpoint} on {place} …"):
        pipeline = load_plain(checkpoint, place, dtype=dtype, detector=detector.value)
    if max_frames < MIN_CHUNKS * num_frames:
        console.print(
            f"--max-frames {max_frames} is less than {MIN_CHUNKS} chunks: what a chunk learns "
            "from the one before hardly shows"
        )
    budget, named = Budget(seconds), lowering_on(place, lowering)
    conditions = conditions_of(pipeline, lowering=named, steps=steps, num_frames=num_frames)
    subject = {
        "clip": clip_key(video),
        "audio": None if audio is None else clip_key(audio),
        "conditions": asdict(conditions),
        "detector": detector.value,
        "max_frames": max_frames,
        "held_out": held_out,
    }
    kept = KeptTrials(output.with_name(f"{output.name}.trials"), subject)
    if len(kept):
        console.print(f"{kept.path}: goes on after {len(kept)} runs", highlight=False)
    with progress_bars(console) as bar:
        bench = Bench(
            pipeline,
            Clip(video, audio),
            max_frames=max_frames,
            held_out=held_out,
            num_frames=num_frames,
            steps=steps,
            lowering=named,
            progress=bar,
        )
        try:
            tuned = tune_on(
                bench, kept, min_psnr=min_psnr, tolerance=tolerance, budget=budget,
                tried=groups(steps),
            )  # fmt: skip
            frames = bench.tuned, bench.held_out
        finally:
            bench.close()
    found = {
        **to_dict(tuned, min_psnr),
        "min_psnr": min_psnr,
        "tolerance": tolerance,
        "frames": frames[0],
        "held_out": frames[1],
        "video": video.name,
        "audio": None if audio is None else audio.name,
        "checkpoint": checkpoint,
        "subject": subject,
        "conditions": subject["conditions"],
        "date": describe_machine(pipeline)["date"],
    }
    write_configuration(output, tuned.chosen.options, **found)
    if tuned.complete:
        kept.remove()
    if as_json:
        answer = {"options": tuned.chosen.options, **found, "file": str(output)}
        typer.echo(json.dumps(answer, indent=2))
    elif not quiet:
        print_answer(tuned, Console(), min_psnr=min_psnr, tolerance=tolerance, frames=frames)
        sound = "" if audio is None else f" {audio}"
        typer.echo(f"use it: lsync sync {video}{sound} -o out.mp4 --config {output}")
    if not tuned.complete:
        typer.echo("lsync: out of time; the same call goes on", err=True)
        raise typer.Exit(UNFINISHED)
    if min_fps is not None and tuned.chosen.measured.fps < min_fps:
        typer.echo(
            f"lsync: {tuned.chosen.measured.fps:.2f} frames/s at {min_psnr:g} dB and above; "
            f"{min_fps:g} were asked for",
            err=True,
        )
        raise typer.Exit(TOO_SLOW)

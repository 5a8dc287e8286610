"""``lsync tune``: the fastest options that are good enough, on the user's machine and clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lsync_compile.bars import progress_bars
from lsync_compile.errors import MediaError

if TYPE_CHECKING:
    from lsync_compile.tune.search import Trial

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
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="Start no trial that would end later.")
    ] = None,
    checkpoint: Annotated[
        str, typer.Option(help="'mini' (bundled) or a LatentSync 1.5/1.6 checkpoint folder.")
    ] = "mini",
    max_frames: Annotated[
        int, typer.Option(min=1, help="Of the clip; at least three chunks tell most.")
    ] = 64,
    num_frames: Annotated[int, typer.Option(min=1, help="Frames a chunk.")] = 16,
    steps: Annotated[
        int, typer.Option(min=2, max=1000, help="Denoising steps of the unoptimised run.")
    ] = 20,
    lowering: Annotated[
        str | None, typer.Option(help="inductor (default on a GPU) or eager.")
    ] = None,
    detector: Annotated[str, typer.Option(help="mtcnn or insightface.")] = "mtcnn",
    device: Annotated[
        str | None, typer.Option(help="cuda, cuda:1, cpu; the first GPU if any.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Measure options on a clip and write the fastest ones that stay above the floor.

    Runs the clip once as it is and once for each candidate, from careful to bold: fewer steps, the
    path of the chunk before, the decoder's crop, lip attention, deep features. What is written is
    good for this clip's kind, this checkpoint and this machine; `guard_every` watches it on others.
    """
    from lsync_compile.devices import choose_device
    from lsync_compile.quality.cli import load_pipeline
    from lsync_compile.quality.compare import Clip, describe_machine
    from lsync_compile.tune.configuration import write_configuration
    from lsync_compile.tune.measuring import Bench
    from lsync_compile.tune.search import best_of, groups, walk

    if not output.parent.is_dir():
        raise MediaError(f"{output}: the folder {output.parent} does not exist")
    place = choose_device(device)
    console = Console(stderr=True, quiet=quiet or as_json)
    with console.status(f"Loading {checkpoint} on {place} …"):
        pipeline = load_pipeline(checkpoint, place, dtype, detector)
    if max_frames < MIN_CHUNKS * num_frames:
        console.print(
            f"--max-frames {max_frames} is less than {MIN_CHUNKS} chunks: what a chunk learns "
            "from the one before hardly shows"
        )
    trials: list[Trial] = []
    with progress_bars(console) as bar:
        bench = Bench(
            pipeline,
            Clip(video, audio),
            max_frames=max_frames,
            num_frames=num_frames,
            steps=steps,
            lowering=lowering or ("inductor" if place.type == "cuda" else "eager"),
            progress=bar,
        )
        try:
            plain = bench.reference.frames_per_second
            trials.extend(
                walk(bench.measure, min_psnr=min_psnr, minutes=minutes, tried=groups(steps))
            )
        finally:
            bench.close()
    best = best_of(trials)
    about = {
        "measured": best.to_dict()["measured"],
        "min_psnr": min_psnr,
        "steps": steps,
        "unoptimised_fps": round(plain, 3),
        "clip": video.name,
        "checkpoint": checkpoint,
        "machine": describe_machine(pipeline),
        "tried": [trial.to_dict() for trial in trials],
    }
    write_configuration(output, best.options, **about)
    if as_json:
        typer.echo(json.dumps({"options": best.options, **about, "file": str(output)}, indent=2))
    elif not quiet:
        print_trials(trials, plain, Console())
        typer.echo(f"{best.name}: {best.measured.fps:.2f} frames/s, written to {output}")
    if min_fps is not None and best.measured.fps < min_fps:
        typer.echo(
            f"lsync: {best.measured.fps:.2f} frames/s at {min_psnr:g} dB and above; "
            f"{min_fps:g} were asked for",
            err=True,
        )
        raise typer.Exit(TOO_SLOW)


def print_trials(trials: list[Trial], plain: float, console: Console) -> None:
    """The table of what was tried."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("", "frames/s", "PSNR dB", "SSIM", "flicker", ""):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    table.add_row("unoptimised", f"{plain:.2f}", "", "", "", "", style="dim")
    for trial in trials:
        found = trial.measured
        psnr = "equal" if found.psnr == float("inf") else f"{found.psnr:.2f}"
        table.add_row(
            trial.name, f"{found.fps:.2f}", psnr, f"{found.ssim:.4f}", f"{found.flicker:.2f}",
            trial.verdict, style=None if trial.verdict == "kept" else "dim",
        )  # fmt: skip
    console.print(table)

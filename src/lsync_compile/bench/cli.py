"""``lsync bench``: speed and quality of this package beside what a user would otherwise run."""

from __future__ import annotations

import json
from enum import Enum
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lsync_compile.cli_options import (
    UNFINISHED,
    AsJson,
    ChunkFrames,
    Device,
    NumberFormat,
    Quiet,
)
from lsync_compile.errors import OptionError


class Size(str, Enum):
    """Networks to time."""

    full = "full"
    mini = "mini"
    small = "small"


class What(str, Enum):
    """What to measure."""

    speed = "speed"
    quality = "quality"
    waterfall = "waterfall"
    end_to_end = "end-to-end"


def bench(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for bench.json, .md, .html and plots.")
    ] = Path("bench"),
    what: Annotated[
        list[What] | None,
        typer.Option("--measure", help="speed and quality by default; may be given again."),
    ] = None,
    row: Annotated[
        list[str] | None,
        typer.Option(
            help="A row's name, or the beginning of some; may be given again. All by default."
        ),
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option(help="File of `lsync tune` whose options are a row too; may be given again."),
    ] = None,
    size: Annotated[
        Size | None,
        typer.Option(
            help="full: LatentSync 1.6 with random weights (default on a GPU); mini: the bundled "
            "model (default on a CPU); small: a check of the command."
        ),
    ] = None,
    clip: Annotated[
        Path | None, typer.Option(help="For the quality; the bundled sample by default.")
    ] = None,
    audio: Annotated[Path | None, typer.Option(help="Speech; the clip's own by default.")] = None,
    recording: Annotated[
        Path | None,
        typer.Option(
            help="Faces and sound of the clip as tensors; recorded there if missing, by default "
            "in --out. With it, no library for videos is needed."
        ),
    ] = None,
    max_frames: Annotated[int, typer.Option(min=2, help="Of the clip.")] = 48,
    num_frames: ChunkFrames = 16,
    runs: Annotated[int, typer.Option(min=1, help="Chunks timed, after two that warm up.")] = 5,
    steps: Annotated[
        int, typer.Option(min=2, max=1000, help="Of the plain run; 20 is what is compared.")
    ] = 20,
    seconds: Annotated[
        float | None,
        typer.Option(help="Start nothing that would take longer; the same call goes on later."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what is on file too.")] = False,
    device: Device = None,
    dtype: NumberFormat = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Time and judge the original, Inductor, few-step solvers, TensorRT and the presets.

    Speed is that of the UNet and the VAE, chunk by chunk, and with --measure end-to-end that of
    whole jobs with a real clip; quality is that of the bundled model. A
    row whose output is wrong is not timed and says so. Results are filed row by row: the same call
    measures what is missing, and leaves with code 75 where --seconds were not enough.
    """
    from lsync_compile.bench.command import Plan, run
    from lsync_compile.bench.page import write_all
    from lsync_compile.bench.tables import markdown
    from lsync_compile.devices import choose_device, choose_dtype

    if audio is not None and clip is None:
        raise OptionError("--audio needs --clip")
    for path in (clip, audio):
        if path is not None and not path.is_file():
            raise OptionError(f"{path}: no such file")
    place = choose_device(device)
    sample = Path(str(files("lsync_compile"))) / "assets" / "sample"
    plan = Plan(
        results=out / "bench.json",
        device=place,
        dtype=choose_dtype(dtype, place),
        size=(size or (Size.full if place.type == "cuda" else Size.mini)).value,
        recording=recording or out / "recording.safetensors",
        clip=clip or sample / "talking.mp4",
        audio=audio if clip is not None else sample / "speech.wav",
        frames=num_frames,
        runs=runs,
        measures=tuple(each.value for each in what) if what else ("speed", "quality"),
        names=tuple(row or ()),
        configurations=tuple(config or ()),
        all_frames=max_frames,
        steps=steps,
        seconds=seconds,
        again=again,
    )
    if not plan.rows():
        raise OptionError(f"--row {', '.join(row or ())}: no row begins like that")
    console = Console(stderr=True, quiet=quiet or as_json)
    results, late = run(plan, lambda text: console.print(text, highlight=False, markup=False))
    written = write_all(out, results.sections)
    if as_json:
        summary = {"sections": results.sections, "unfinished": late or None}
        typer.echo(json.dumps(summary, indent=2))
    elif not quiet:
        typer.echo(markdown(results.sections))
        for path in [plan.results, *written]:
            typer.echo(str(path))
    if late:
        typer.echo(f"lsync: out of time before {late}; the same call goes on", err=True)
        raise typer.Exit(UNFINISHED)

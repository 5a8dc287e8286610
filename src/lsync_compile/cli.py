"""The command line: ``lsync sync | bench | tune | quality | explain | doctor | cache | web``."""

from __future__ import annotations

import io
import json
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from lsync_compile import __version__
from lsync_compile.bars import one_bar
from lsync_compile.bench.cli import bench
from lsync_compile.cli_options import (
    AsJson,
    Checkpoint,
    ChunkFrames,
    Detector,
    DetectorName,
    Device,
    Lowering,
    LoweringName,
    NumberFormat,
    Quiet,
    Resolution,
)
from lsync_compile.devices import choose_device
from lsync_compile.errors import Interrupted, LsyncError, OptionError
from lsync_compile.quality.calibrate_cli import calibrate
from lsync_compile.quality.cli import quality
from lsync_compile.runtime.cache_cli import cache
from lsync_compile.tune.cli import tune
from lsync_compile.web.cli import web

app = typer.Typer(
    name="lsync",
    help="Real-time lip sync with LatentSync, compiled.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Preset(str, Enum):
    """Named sets of options."""

    exact = "exact"
    balanced = "balanced"
    turbo = "turbo"


class Kernels(str, Enum):
    """Whether passes may put this package's kernels into graphs."""

    auto = "auto"
    on = "on"
    off = "off"


class Part(str, Enum):
    """A network of the pipeline."""

    unet = "unet"
    encoder = "vae.encoder"
    decoder = "vae.decoder"


ALL_PARTS = list(Part)


class MissingFace(str, Enum):
    """What to do with a frame without a usable face."""

    keep = "pass"
    fail = "fail"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lsync-compile {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it, leave."),
    ] = False,
) -> None:
    """Real-time lip sync with LatentSync, compiled."""


@app.command()
def sync(
    video: Annotated[Path | None, typer.Argument(help="Clip with one talking face.")] = None,
    audio: Annotated[
        Path | None, typer.Argument(help="Speech to sync to; the clip's own sound if left out.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="MP4 to write; replaced only when finished.")
    ] = Path("out.mp4"),
    jobs: Annotated[
        Path | None,
        typer.Option(help="CSV of video, audio, output: many clips instead of VIDEO and AUDIO."),
    ] = None,
    redo: Annotated[
        bool, typer.Option("--redo", help="With --jobs, also those whose output exists.")
    ] = False,
    checkpoint: Checkpoint = "mini",
    resolution: Resolution = None,
    preset: Annotated[
        Preset | None, typer.Option(help="Options as a set; balanced by default.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="File of options that `lsync tune` wrote.")
    ] = None,
    lowering: LoweringName = None,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Without, the plain pipeline runs.")
    ] = True,
    strict: Annotated[
        bool, typer.Option(help="Fail where a graph cannot be compiled, no eager fallback.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps a chunk.")] = 20,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1.0 switches it off.")] = 1.5,
    num_frames: ChunkFrames = 16,
    max_frames: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many frames.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=-(2**63), max=2**63 - 1, help="Of all random draws.")
    ] = 1247,
    mask: Annotated[
        Path | None, typer.Option(help="Picture of the mouth mask, black is generated.")
    ] = None,
    on_missing_face: Annotated[
        MissingFace, typer.Option(help="pass leaves such frames unchanged.")
    ] = MissingFace.keep,
    detector: DetectorName = Detector.mtcnn,
    device: Device = None,
    devices: Annotated[
        str | None,
        typer.Option(
            help="With --jobs: cuda:0,cuda:1 or cpu,cpu, a worker each; auto (default): all GPUs."
        ),
    ] = None,
    dtype: NumberFormat = None,
    guard_every: Annotated[
        int | None,
        typer.Option(min=0, help="Also compute one chunk in so many exactly; fall back if far."),
    ] = None,
    guard_floor: Annotated[
        float | None, typer.Option(min=0.0, help="Least PSNR of the mouth then, dB; 30 if not set.")
    ] = None,
    clip_cache: Annotated[
        bool,
        typer.Option(
            "--clip-cache", help="Keep faces and encodings of VIDEO for the next sound to it."
        ),
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write a timeline: .json (Chrome trace), .png or .svg.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Also write the run's report here as JSON.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Sync the mouth in VIDEO to AUDIO."""
    from lsync_compile.jobs.command import check_report, load, sync_list, write_report
    from lsync_compile.jobs.listing import ListedJob
    from lsync_compile.jobs.settings import SyncSettings
    from lsync_compile.runtime.timeline import check_trace_path
    from lsync_compile.tune.configuration import read_conditions, read_configuration

    if trace is not None:
        check_trace_path(trace)
    if (video is None) == (jobs is None):
        raise OptionError("give VIDEO or --jobs LIST.csv, one of the two")
    if jobs is None and devices is not None:
        raise OptionError("--devices spreads the clips of --jobs; for one clip use --device")
    if jobs is not None and trace is not None:
        raise OptionError("--trace shows the run of one clip; leave it out with --jobs")
    if config is not None and preset is not None:
        raise OptionError("give --preset or --config, one of the two")
    given: dict[str, Any] = {
        "lowering": lowering.value if lowering else None,
        "strict": strict or None,
        "clip_cache": clip_cache or None,
        "trace": trace,
        "guard_every": guard_every,
        "guard_floor": guard_floor,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if not compiled and (given or config is not None):
        raise OptionError(
            "--no-compile leaves nothing for --config, --lowering, --strict, --clip-cache, "
            "--guard-every or --trace to act on"
        )
    base = {"preset": (preset or Preset.balanced).value}
    options = {**(base if config is None else read_configuration(config)), **given}
    if guard_floor is not None and not options.get("guard_every"):
        raise OptionError("--guard-floor does nothing without --guard-every")
    settings = SyncSettings(
        checkpoint=checkpoint,
        resolution=resolution,
        detector=detector.value,
        dtype=dtype,
        options=options if compiled else None,
        measured_with={} if config is None else read_conditions(config),
        seed=seed,
        arguments={
            "num_frames": num_frames,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "mask_image_path": mask,
            "on_missing_face": on_missing_face.value,
            "max_frames": max_frames,
        },
    )
    if jobs is not None:
        sync_list(
            jobs, settings, device=device, devices=devices, redo=redo, report=report,
            as_json=as_json, quiet=quiet,
        )  # fmt: skip
        return
    assert video is not None
    check_report(report)
    console = Console(stderr=True, quiet=quiet or as_json)
    syncer = load(settings, device, console)
    with one_bar(console, f"Syncing {output.name}") as advance:
        result = syncer(ListedJob(0, video, audio, output), advance)
    summary = {
        "output": str(output),
        "frames": result.num_frames,
        "frames_without_face": result.missing_faces,
        "seconds": round(result.seconds, 3),
        "frames_per_second": round(result.num_frames / result.seconds, 3),
        **syncer.about(),
    }
    write_report(report, json.dumps(summary, indent=2))
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    elif not quiet:
        if compiled:
            console.print(str(syncer.report()))
        missing = f", {result.missing_faces} without a face" if result.missing_faces else ""
        typer.echo(
            f"{output}: {result.num_frames} frames{missing} in {result.seconds:.1f} s "
            f"({summary['frames_per_second']:.2f} frames/s)"
        )


@app.command()
def explain(
    checkpoint: Checkpoint = "mini",
    resolution: Resolution = None,
    preset: Annotated[Preset, typer.Option(help="Options as a set.")] = Preset.balanced,
    lowering: Annotated[Lowering, typer.Option(help="What would run it.")] = Lowering.eager,
    num_frames: ChunkFrames = 16,
    guidance: Annotated[bool, typer.Option(help="With the doubled batch of guidance.")] = True,
    part: Annotated[list[Part], typer.Option(help="A network; may be given again.")] = ALL_PARTS,
    kernels: Annotated[
        Kernels, typer.Option(help="on shows on a CPU what kernels replace on a GPU.")
    ] = Kernels.auto,
    dump: Annotated[
        Path | None, typer.Option(help="Folder for the graph before and after each pass.")
    ] = None,
    device: Device = None,
    dtype: NumberFormat = None,
    as_json: AsJson = False,
) -> None:
    """Say what the backend does with a checkpoint's networks, pass by pass, and why not."""
    from lsync_compile.explain import explain as explain_module
    from lsync_compile.loading import load_plain

    pipe = load_plain(checkpoint, choose_device(device), dtype=dtype, resolution=resolution)
    inputs = pipe.example_inputs(num_frames, guidance)
    explanation = explain_module(
        pipe,
        {role.value: inputs[role.value] for role in part},
        terms=pipe.example_terms(guidance),
        preset=preset.value,
        lowering=lowering.value,
        kernels=kernels.value,
        dump_dir=dump,
    )
    typer.echo(json.dumps(explanation.to_dict(), indent=2) if as_json else str(explanation))


app.command()(bench)
app.command()(quality)
app.command()(tune)
app.command()(calibrate)
app.command()(cache)
app.command()(web)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check this machine: versions, devices, codecs, the bundled model, a small compile."""
    from lsync_compile.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([finding.to_dict() for finding in findings], indent=2))
    else:
        console = Console()
        marks = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "failed": "[red]failed[/]"}
        for finding in findings:
            detail = escape(finding.detail)  # pip's [extras] are no markup
            console.print(f"{marks[finding.state]:>18}  [bold]{finding.name}[/]: {detail}")
    if any(finding.state == "failed" for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Entry point: errors become one line on standard error and an exit code."""
    interrupted = False

    def interrupt(number: int, frame: Any) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    # SIGTERM is what a batch system or a container sends when time is up: as Ctrl-C, nothing half
    # is left. Typer would give both the exit code of an error.
    before = {each: signal.signal(each, interrupt) for each in (signal.SIGINT, signal.SIGTERM)}
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that a terminal cannot show
    try:
        app()
    except LsyncError as error:
        typer.echo(f"lsync: {_in_one_line(str(error))}", err=True)
        sys.exit(error.exit_code)
    except SystemExit:
        if interrupted:
            sys.exit(Interrupted.exit_code)
        raise
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _in_one_line(text: str) -> str:
    """Names of files may hold line breaks and what moves the cursor."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


if __name__ == "__main__":
    main()

"""``lsync quality``: how good a way of running is, on the user's own clip."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    NumberFormat,
    lowering_on,
)
from lsync_compile.options import resolve_options

# torch and the measures are imported when the command runs: they take seconds.
if TYPE_CHECKING:
    from lsync_compile.quality.bars import Verdict
    from lsync_compile.quality.compare import Study
    from lsync_compile.quality.floors import Floor
    from lsync_compile.quality.runs import Run, Setting

NO_PRESET = "none"
BELOW_BAR = 1


class Solver(str, Enum):
    """What walks from noise to picture."""

    ddim = "ddim"
    dpmpp_2m = "dpmpp_2m"
    unipc = "unipc"


class Spacing(str, Enum):
    """How a solver spreads its steps over the noise levels."""

    leading = "leading"
    linspace = "linspace"
    trailing = "trailing"


def quality(
    video: Annotated[Path, typer.Argument(help="Clip with one talking face.")],
    audio: Annotated[
        Path | None,
        typer.Argument(help="Speech to sync to; left out, the clip's own: then the clip is truth."),
    ] = None,
    checkpoint: Checkpoint = "mini",
    preset: Annotated[
        str, typer.Option(help="Of the candidate: exact, balanced, turbo; none runs it plain.")
    ] = "balanced",
    lowering: LoweringName = None,
    steps: Annotated[
        int, typer.Option(min=1, max=1000, help="Denoising steps of the candidate.")
    ] = 20,
    solver: Annotated[Solver, typer.Option(help="Of the candidate.")] = Solver.ddim,
    spacing: Annotated[
        Spacing | None, typer.Option(help="Of the candidate's steps; the checkpoint's by default.")
    ] = None,
    guidance: Annotated[
        float, typer.Option(help="Guidance scale of the candidate; 1.0 switches it off.")
    ] = 1.5,
    num_frames: Annotated[int, typer.Option(min=1, help="Frames a chunk, for all runs.")] = 16,
    max_frames: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many frames.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all random draws, for all runs.")] = 1247,
    floors: Annotated[
        bool, typer.Option(help="Measure the noise floors too; one more run.")
    ] = True,
    muted: Annotated[
        bool, typer.Option(help="Also run the reference with silence, as a control.")
    ] = False,
    check: Annotated[
        bool, typer.Option(help="Leave with code 1 if the preset's bar is missed.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Also write a page with pictures and plots.")
    ] = None,
    detector: DetectorName = Detector.mtcnn,
    device: Device = None,
    dtype: NumberFormat = None,
    as_json: AsJson = False,
) -> None:
    """Compare a way of running with the unoptimised 20-step run, same seed, same inputs."""
    from lsync_compile.devices import choose_device
    from lsync_compile.loading import load_plain
    from lsync_compile.quality.bars import judge_presets
    from lsync_compile.quality.compare import REFERENCE, Clip, Compiler, compare
    from lsync_compile.quality.report import check_target, write_page
    from lsync_compile.quality.tables import print_tables

    if html is not None:
        check_target(html)
    place = choose_device(device)
    shared: dict[str, Any] = {"num_frames": num_frames, "seed": seed}
    candidate = _setting(
        preset,
        lowering_on(place, lowering),
        steps=steps,
        solver=solver.value,
        spacing=spacing.value if spacing else None,
        guidance_scale=guidance,
        **shared,
    )
    reference = _with(REFERENCE, **shared)
    settings = [candidate, _with(reference, name="muted", muted=True)] if muted else [candidate]
    console = Console(stderr=True, quiet=as_json)
    with console.status(f"Loading {checkpoint} on {place} …"):
        pipe = load_plain(checkpoint, place, dtype=dtype, detector=detector.value)
    clip, runs = Clip(video, audio), list[Any]()
    with progress_bars(console) as bar:
        study = compare(
            pipe,
            clip,
            settings,
            reference=reference,
            prepare=Compiler(),
            measure_floors=_measure_floors(pipe, clip, bar) if floors else None,
            max_frames=max_frames,
            progress=lambda setting: bar(setting.name),
            keep=runs.append if html is not None else None,
        )
    verdicts = judge_presets(study)
    if html is not None:
        write_page(html, study, runs, verdicts)
    if as_json:
        typer.echo(json.dumps(_summary(study, verdicts, html), indent=2, allow_nan=False))
    else:
        print_tables(study, Console())
        for line in (*map(str, verdicts), *([f"page: {html}"] if html else [])):
            typer.echo(line)
    if check and not all(verdict.passed for verdict in verdicts):
        raise typer.Exit(BELOW_BAR)


def _setting(preset: str, lowering: str, **arguments: Any) -> Setting:
    """The candidate; wrong options are refused here, before anything is loaded."""
    from lsync_compile.quality.runs import Setting

    if preset == NO_PRESET:
        return Setting("candidate", **arguments)
    options = {"preset": preset, "lowering": lowering}
    resolve_options(options=options)
    return Setting(preset, options=options, **arguments)


def _with(setting: Setting, **changes: Any) -> Setting:
    import dataclasses

    return dataclasses.replace(setting, **changes)


def _measure_floors(pipeline: Any, clip: Any, bar: Any) -> Any:
    from lsync_compile.quality.floors import codec_floor, precision_floor

    def measure(run: Run) -> list[Floor]:
        other = precision_floor(
            pipeline, clip.video, clip.audio, run, progress=bar("other number format")
        )
        return [other, codec_floor(run, pipeline.detector)]

    return measure


def _summary(study: Study, verdicts: list[Verdict], html: Path | None) -> dict[str, Any]:
    return {
        **study.to_dict(),
        "verdicts": [verdict.to_dict() for verdict in verdicts],
        "html": None if html is None else str(html),
    }

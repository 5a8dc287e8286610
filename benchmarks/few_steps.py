"""What fewer denoising steps cost: the price list that every other optimisation has to beat.

Runs the plain pipeline with 20, 15, 10 and 8 steps of DDIM, DPM-Solver++ and UniPC on the same
inputs with the same noise, and judges each by the 20-step DDIM run and, with the clip's own sound,
by the clip:

    python benchmarks/few_steps.py clip.mp4 [speech.wav] [--checkpoint mini] [--max-frames 96]

Writes ``benchmarks/results/few_steps.<device>.json`` and prints the table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lsync_compile.models.pipeline import LatentSyncPipeline
from lsync_compile.quality.compare import Clip, Compiler, Result, Study, compare
from lsync_compile.quality.floors import codec_floor, precision_floor
from lsync_compile.quality.runs import SPACINGS, Setting
from lsync_compile.quality.tables import number, print_tables
from lsync_compile.runtime.timesteps import SOLVERS

RESULTS = Path(__file__).parent / "results"


def settings(steps: list[int], solvers: list[str], spacings: list[str]) -> list[Setting]:
    """Every combination but the reference itself."""
    return [
        Setting(
            f"{solver} {count}" + (f" {spacing}" if spacing != "leading" else ""),
            steps=count,
            solver=solver,
            spacing=spacing,
        )
        for solver in solvers
        for spacing in spacings
        for count in steps
        if (solver, spacing, count) != ("ddim", "leading", 20)
    ]


def markdown(study: Study) -> str:
    """The study as the table for the documentation, fastest last."""
    lines = [
        "| setting | s a chunk | frames/s | mouth PSNR dB | worst frame dB | mouth SSIM | flicker |"
        " to the original dB | sync best (offset) | on the curve |",
        "| --- " * 10 + "|",
    ]
    curve = pareto(study.candidates)
    for result in (study.reference, *study.candidates):
        mouth = result.against_reference.get("mouth")
        truth = result.against_original.get("mouth")
        chunk = result.setting.num_frames / result.frames_per_second
        cells = [
            result.setting.name,
            f"{chunk:.2f}",
            f"{result.frames_per_second:.2f}",
            number(mouth.psnr.value, 2) if mouth else "",
            number(mouth.worst_psnr.value, 2) if mouth else "",
            number(mouth.ssim.value, 4) if mouth else "",
            number(mouth.flicker.value, 2) if mouth else "",
            number(truth.psnr.value, 2) if truth else "",
            f"{number(result.sync.best, 2)} ({result.sync.offset:+d})",
            "yes" if result.setting.name in curve else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pareto(results: list[Result]) -> set[str]:
    """Names of the results that no other beats in both steps and mouth PSNR."""

    def beats(one: Result, other: Result) -> bool:
        ours, theirs = (r.against_reference["mouth"].psnr.value for r in (one, other))
        steps, others = one.setting.steps, other.setting.steps
        return steps <= others and ours >= theirs and (steps < others or ours > theirs)

    return {
        result.setting.name
        for result in results
        if not any(beats(other, result) for other in results)
    }


def without_series(value: Any) -> Any:
    """The answer without what it says for every frame: results are committed."""
    if isinstance(value, dict):
        series = ("frames_psnr", "opening")
        return {key: without_series(inner) for key, inner in value.items() if key not in series}
    return [without_series(inner) for inner in value] if isinstance(value, list) else value


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video", type=Path)
    parser.add_argument("audio", type=Path, nargs="?", help="the clip's own sound if left out")
    parser.add_argument("--checkpoint", default="mini")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="float16 on a GPU, float32 on a CPU")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 15, 10, 8])
    parser.add_argument("--solvers", nargs="+", choices=list(SOLVERS), default=list(SOLVERS))
    parser.add_argument("--spacings", nargs="+", choices=SPACINGS, default=["leading"])
    parser.add_argument("--max-frames", type=int, default=None)
    parser.add_argument("--no-floors", action="store_true")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "float16")
    pipeline = LatentSyncPipeline.from_pretrained(
        arguments.checkpoint, torch_dtype=getattr(torch, dtype), device=arguments.device
    )
    clip = Clip(arguments.video, arguments.audio)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def bar(setting: Setting) -> object:
            task = progress.add_task(setting.name, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        study = compare(
            pipeline,
            clip,
            settings(arguments.steps, arguments.solvers, arguments.spacings),
            prepare=Compiler(),
            max_frames=arguments.max_frames,
            progress=bar,
            measure_floors=None
            if arguments.no_floors
            else lambda run: [
                precision_floor(pipeline, clip.video, clip.audio, run),
                codec_floor(run, pipeline.detector),
            ],
        )
    print_tables(study, Console(stderr=True))
    print(markdown(study))
    device = re.sub(r"[^a-z0-9]+", "-", study.machine["device"].lower()).strip("-")
    path = arguments.output or RESULTS / f"few_steps.{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    answer = {
        "benchmark": "few_steps",
        "checkpoint": Path(arguments.checkpoint).name,
        "pareto": sorted(pareto(study.candidates)),
        **without_series(study.to_dict()),
        # Names and not paths: results are committed.
        "video": clip.video.name,
        "audio": clip.audio.name if clip.audio else None,
    }
    path.write_text(json.dumps(answer, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"\n{path}")


if __name__ == "__main__":
    main()

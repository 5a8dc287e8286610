"""What fewer denoising steps cost: the price list that every other optimisation has to beat.

Runs the plain pipeline with 20, 15, 10 and 8 steps of DDIM, DPM-Solver++ and UniPC on the same
inputs with the same noise, and judges each by the 20-step DDIM run and, with the clip's own sound,
by the clip:

    python benchmarks/few_steps.py clip.mp4 [speech.wav] [--checkpoint mini] [--max-frames 96]

Writes ``benchmarks/results/few_steps.<device>.json`` row by row and prints the table in Markdown;
the same call again measures what is missing.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, merge_results, recorded

from lsync_compile.models.pipeline import LatentSyncPipeline
from lsync_compile.quality.compare import Clip, clip_energy, judge
from lsync_compile.quality.floors import codec_floor, precision_floor
from lsync_compile.quality.runs import SPACINGS, Run, Setting, collect
from lsync_compile.quality.scores import Scores
from lsync_compile.runtime.timesteps import SOLVERS

REFERENCE = "reference"
Row = dict[str, Any]


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


def scores(mouth: Scores) -> Row:
    """The figures of the mouth region against the reference."""
    return {
        "mouth_psnr": round(mouth.psnr.value, 2),
        "worst_frame_psnr": round(mouth.worst_psnr.value, 2),
        "mouth_ssim": round(mouth.ssim.value, 4),
        "flicker": round(mouth.flicker.value, 3),
    }


def judged(made: Run, clip: Clip, reference: Run | None) -> Row:
    """What is filed of a run; ``reference`` is None for the reference itself."""
    result = judge(made, clip, clip_energy(clip, len(made)), reference)
    truth, setting = result.against_original.get("mouth"), made.setting
    against = {} if reference is None else scores(result.against_reference["mouth"])
    return {
        "row": setting.name,
        "solver": setting.solver,
        "spacing": setting.spacing,
        "steps": setting.steps,
        "seconds_a_chunk": round(setting.num_frames / made.frames_per_second, 2),
        **against,
        **({} if truth is None else {"psnr_to_original": round(truth.psnr.value, 2)}),
        "sync_best": result.sync.to_dict()["best"],
        "sync_offset": result.sync.offset,
    }


def pareto(rows: list[Row]) -> set[str]:
    """Names of the rows that no other beats in both steps and mouth PSNR."""

    def beats(one: Row, other: Row) -> bool:
        fewer, nearer = one["steps"] - other["steps"], one["mouth_psnr"] - other["mouth_psnr"]
        return bool(fewer <= 0 <= nearer and (fewer < 0 or nearer > 0))

    candidates = [row for row in rows if "steps" in row and "mouth_psnr" in row]
    return {row["row"] for row in candidates if not any(beats(other, row) for other in candidates)}


def markdown(rows: list[Row]) -> str:
    """The table for the documentation, in the order of the rows."""
    columns = (
        ("setting", "row", ""),
        ("s a chunk", "seconds_a_chunk", ".2f"),
        ("mouth PSNR dB", "mouth_psnr", ".2f"),
        ("worst frame dB", "worst_frame_psnr", ".2f"),
        ("mouth SSIM", "mouth_ssim", ".4f"),
        ("flicker", "flicker", ".2f"),
        ("to the original dB", "psnr_to_original", ".2f"),
        ("sync best", "sync_best", ".2f"),
    )
    lines = ["| " + " | ".join(head for head, *_ in columns) + " | on the curve |"]
    lines.append("| --- " * (len(columns) + 1) + "|")
    curve = pareto(rows)
    for row in rows:
        cells = [
            "" if row.get(name) is None else format(row[name], digits)
            for _, name, digits in columns
        ]
        lines.append("| " + " | ".join(cells) + f" | {'yes' if row['row'] in curve else ''} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, write, print."""
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
    parser.add_argument("--again", action="store_true", help="measure what is on file too")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = arguments.dtype or ("float32" if device.type == "cpu" else "float16")
    clip = Clip(arguments.video, arguments.audio)
    name = device.type if device.type == "cpu" else machine(device)["device"].lower()
    path = arguments.output or RESULTS / f"few_steps.{re.sub(r'[^a-z0-9]+', '-', name)}.json"
    # Names and not paths: results are committed.
    question = (
        f"{Path(arguments.checkpoint).name} in {dtype} on {clip.video.name}, "
        f"{clip.audio.name if clip.audio else 'its own'} sound, "
        f"{arguments.max_frames or 'all'} frames: what do fewer steps cost?"
    )
    done = [] if arguments.again else [key for (key,) in recorded(path, question, device, ("row",))]

    def file(row: Row) -> None:
        print(row, flush=True)
        merge_results(path, question, device, [row], ("row",))

    pipeline: Any = LatentSyncPipeline.from_pretrained(
        arguments.checkpoint, torch_dtype=getattr(torch, dtype), device=device
    )

    def run(setting: Setting, reference: Run | None = None) -> Run:
        return collect(
            pipeline, clip.video, clip.audio, setting,
            max_frames=arguments.max_frames, beside=reference,
        )  # fmt: skip

    wanted = settings(arguments.steps, arguments.solvers, arguments.spacings)
    missing = [setting for setting in wanted if setting.name not in done]
    floors: dict[str, Callable[[Run], Any]] = {
        "floor: other number format": lambda reference: precision_floor(
            pipeline, clip.video, clip.audio, reference
        ),
        "floor: codec": lambda reference: codec_floor(reference, pipeline.detector),
    }
    if arguments.no_floors:
        floors = {}
    floors = {name: measure for name, measure in floors.items() if name not in done}
    if missing or floors or REFERENCE not in done:
        reference = run(Setting(REFERENCE))
        if REFERENCE not in done:
            file(judged(reference, clip, None))
        for name, measure in floors.items():
            floor = measure(reference)
            file({"row": name, "kind": floor.name, **scores(floor.scores["mouth"])})
        for setting in missing:
            file(judged(run(setting, reference), clip, reference))
    print(markdown(json.loads(path.read_text(encoding="utf-8"))["rows"]))


if __name__ == "__main__":
    main()

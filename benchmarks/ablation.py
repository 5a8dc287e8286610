"""What does each approximate optimisation give and cost, alone, together, and against fewer steps?

    python benchmarks/ablation.py quality CLIP [SPEECH] --max-frames 48    # any machine
    python benchmarks/ablation.py speed                                    # full size, on a GPU
    python benchmarks/ablation.py speed --small                            # a check of the script
    python benchmarks/ablation.py table                                    # what is on file

Rows are in ``ablation_rows.py``; ``--rows`` takes some of them by the beginnings of their names.

*quality* runs a trained model (``--checkpoint mini``) on a clip and judges each row by the plain
20-step run on the same inputs and noise: PSNR and SSIM of the mouth region, its worst frame,
flicker, how the mouth follows the sound, and, with the clip's own sound, how much further from the
original the row is than the plain run. *speed* times chunks of the full-size UNet of random weights
with guidance. Results are written row by row; the same call again measures what is missing.

A row is worth its place when its PSNR is above what as many steps reach as the same time allows.
Time is that of *speed* where it is on file; for other rows it is that of as many whole steps and
steps that reuse deep features as they take, from the rows "exact" and "DeepCache 3/0", unless they
change the step itself. With nothing on file steps count as 1 each and those that reuse as
``SHALLOW``, 12 ms of 80. Between measured numbers of steps, PSNR is interpolated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ablation_rows import FEWER_STEPS, ROWS, Row
from common import RESULTS, STAGE2_512, measure, merge_results, recorded

QUALITY, SPEED = RESULTS / "ablation_quality.json", RESULTS / "ablation_speed.json"
SHALLOW = 0.15
OTHER_STEPS = {"lip_attention", "fp8_linear"}  # options with which a step takes another time
BASE = {"preset": "exact", "strict": True}
Point = tuple[float, float]  # cost, dB


def options_of(row: Row, device: torch.device) -> dict[str, Any] | None:
    """Options of ``lsync_compile.compile`` for a row on a device."""
    if row.options is None:
        return None
    # Inductor's C++ takes minutes on a CPU and changes nothing but rounding.
    lowering = {} if device.type == "cuda" else {"lowering": "eager"}
    return {**BASE, **lowering, **row.options}


def measure_quality(arguments: argparse.Namespace) -> None:
    """Run the rows on a clip and file their scores."""
    from lsync_compile.models.pipeline import LatentSyncPipeline
    from lsync_compile.quality.compare import Clip, Compiler, Result, clip_energy, judge
    from lsync_compile.quality.runs import Setting, collect

    device = torch.device(arguments.device)
    pipeline = LatentSyncPipeline.from_pretrained(
        arguments.checkpoint,
        torch_dtype=torch.float16 if device.type == "cuda" else torch.float32,
        device=device,
    )
    clip, prepare = Clip(arguments.clip, arguments.speech), Compiler()
    question = f"{arguments.checkpoint} on {arguments.clip.name}, {arguments.max_frames} frames"
    rows = missing(arguments, QUALITY, question, device)
    if not rows:
        return

    def run(setting: Setting, beside: Any = None) -> tuple[Any, Any]:
        pipe: Any = prepare(pipeline, setting)
        made = collect(
            pipe, clip.video, clip.audio, setting, beside=beside, max_frames=arguments.max_frames
        )
        return made, None if setting.options is None else pipe.lsync.report()

    reference, _ = run(Setting("plain"))
    energy = clip_energy(clip, len(reference))
    base = judge(reference, clip, energy)
    for row in rows:
        setting = Setting(
            row.name, steps=row.steps, solver=row.solver, options=options_of(row, device)
        )
        made, report = (reference, None) if row.options is None else run(setting, reference)
        result: Result = judge(made, clip, energy, reference)
        computed, reused = calls(report, made, row)
        filed = {
            "row": row.name,
            "steps": row.steps,
            "computed": computed,
            "reused": reused,
            "cost_in_steps": round(computed + SHALLOW * reused, 3),
            **scores(result, base),
        }
        merge_results(QUALITY, question, device, [filed], ("row",))
        print(f"{row.name}: {filed}", flush=True)
    prepare(pipeline, Setting("plain"))


def calls(report: Any, made: Any, row: Row) -> tuple[float, float]:
    """UNet calls a chunk that computed all, and that reused deep features."""
    caches = [graph.deep_cache for graph in report.graphs if graph.deep_cache] if report else []
    chunks = len(made.starts)
    reused = sum(cache.reused for cache in caches) / chunks
    # Several features count the steps that they save together.
    counted = report.features.values() if report else []
    saved = max((counters.get("steps_saved", 0) for counters in counted), default=0) / chunks
    return row.steps - saved - reused, reused


def scores(result: Any, base: Any) -> dict[str, Any]:
    """The figures of a row against the plain run; None where nothing could be measured."""
    mouth, truth = result.against_reference["mouth"], result.against_original.get("mouth")
    found = {
        "mouth_psnr": mouth.psnr.value,
        "worst_frame_psnr": mouth.worst_psnr.value,
        "mouth_ssim": mouth.ssim.value,
        "flicker": mouth.flicker.value,
        "loss_to_original": base.against_original["mouth"].psnr.value - truth.psnr.value
        if truth
        else None,
        "sync_best": result.sync.best,
        "sync_offset": result.sync.offset,
    }
    return {name: plain_number(value) for name, value in found.items()}


def plain_number(value: Any) -> float | None:
    """Rounded for JSON; None for what is not finite (the plain run against itself)."""
    if value is None or value != value or abs(value) == float("inf"):
        return None
    return round(float(value), 4)


def measure_speed(arguments: argparse.Namespace) -> None:
    """Time whole chunks of the UNet's steps and file them."""
    from unet_step import SMALL, Steps, random_inputs, random_unet
    from variants import Pipeline

    import lsync_compile

    device = torch.device(arguments.device)
    config = SMALL if arguments.small else STAGE2_512
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    question = f"{config['sample_size']}x{config['sample_size']} latents, {arguments.frames} frames"
    question += f", lowering {arguments.lowering}" if arguments.lowering else ""
    rows = missing(arguments, SPEED, question, device)
    unet = random_unet(config, device).to(dtype)
    inputs = random_inputs(config, arguments.frames, 2, device, dtype)
    started = time.perf_counter()
    for row in rows:
        if arguments.seconds and time.perf_counter() - started > arguments.seconds:
            print(f"out of time before {row.name}; run the same call again")
            return
        torch._dynamo.reset()
        options = options_of(row, device)
        fast = None
        if options is not None:
            options |= {"lowering": arguments.lowering} if arguments.lowering else {}
            fast = lsync_compile.compile(Pipeline(unet), compile_vae=False, **options)
        try:
            steps = Steps(unet, inputs, row.steps)
            steps.chunk()  # compiles, captures
            timing = measure(steps.chunk, device, warmup=1, runs=arguments.runs)
        finally:
            if fast is not None:
                fast.lsync.undo()
        filed = {"row": row.name, "steps": row.steps, **timing.to_dict()}
        merge_results(SPEED, question, device, [filed], ("row",))
        print(f"{row.name}: {timing.p50:.1f} ms a chunk", flush=True)


def missing(
    arguments: argparse.Namespace, path: Path, question: str, device: torch.device
) -> list[Row]:
    """The rows that are asked for and not on file."""
    done = [] if arguments.again else [key for (key,) in recorded(path, question, device, ("row",))]
    wanted = arguments.rows or [""]
    return [row for row in ROWS if row.name.startswith(tuple(wanted)) and row.name not in done]


def table() -> str:
    """All rows on file in Markdown, beside what fewer steps reach at the same cost."""
    quality = {row["row"]: row for row in json.loads(QUALITY.read_text())["rows"]}
    speed = {}
    if SPEED.exists():
        speed = {row["row"]: row["p50"] for row in json.loads(SPEED.read_text())["rows"]}
    cost = cost_of(quality, speed)
    fewer = sorted(
        (cost(row.name), quality[row.name]["mouth_psnr"])
        for row in FEWER_STEPS
        if row.name in quality and cost(row.name) is not None
    )
    timed = "ms a chunk" if speed else "cost in steps"
    lines = [
        f"| row | {timed} | computed + reused | mouth PSNR dB | worst frame | SSIM | flicker "
        "| further from the original | sync | fewer steps at this cost |",
        "| --- " * 10 + "|",
    ]
    for row in ROWS:
        filed = quality.get(row.name)
        if filed is None:
            continue
        price = cost(row.name)
        rival = None if price is None else at_cost(fewer, price)
        cells = [
            row.name,
            shown(price, 1 if speed else 2),
            f"{filed['computed']:g} + {filed['reused']:g}",
            shown(filed["mouth_psnr"], 2),
            shown(filed["worst_frame_psnr"], 2),
            shown(filed["mouth_ssim"], 4),
            shown(filed["flicker"], 2),
            shown(filed["loss_to_original"], 2),
            shown(filed["sync_best"], 2),
            "" if row in FEWER_STEPS or row.options in (None, {}) else shown(rival, 2),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cost_of(quality: dict[str, Any], speed: dict[str, float]) -> Callable[[str], float | None]:
    """What a row costs: its time, or that of its steps where those are timed, else its steps."""
    cached = quality.get("DeepCache 3/0")
    if not speed:
        return lambda name: quality[name]["cost_in_steps"]
    if "exact" not in speed or cached is None or cached["row"] not in speed:
        return speed.get
    step = speed["exact"] / quality["exact"]["computed"]
    reusing = (speed[cached["row"]] - cached["computed"] * step) / cached["reused"]

    other = {row.name for row in ROWS if row.options is None or row.options.keys() & OTHER_STEPS}

    def cost(name: str) -> float | None:
        row = quality[name]
        steps = row["computed"] * step + row["reused"] * reusing
        return speed.get(name, None if name in other else steps)

    return cost


def at_cost(points: list[Point], cost: float) -> float | None:
    """dB at a cost on the line through points in order of cost; None outside of them."""
    for (low, one), (high, other) in itertools.pairwise(points):
        if low <= cost <= high and high > low:
            return one + (other - one) * (cost - low) / (high - low)
    return None


def shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--rows", nargs="+", help="beginnings of names; all by default")
    common.add_argument("--again", action="store_true", help="measure what is on file too")
    common.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    quality = commands.add_parser("quality", parents=[common])
    quality.add_argument("clip", type=Path)
    quality.add_argument("speech", type=Path, nargs="?", help="the clip's own by default")
    quality.add_argument("--checkpoint", default="mini")
    quality.add_argument("--max-frames", type=int)
    speed = commands.add_parser("speed", parents=[common])
    speed.add_argument("--small", action="store_true")
    speed.add_argument("--frames", type=int, default=16)
    speed.add_argument("--runs", type=int, default=3)
    speed.add_argument("--seconds", type=float, help="start nothing after so long")
    speed.add_argument("--lowering", choices=("inductor", "eager"), help="eager compiles sooner")
    commands.add_parser("table")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.command == "quality":
        measure_quality(arguments)
    elif arguments.command == "speed":
        measure_speed(arguments)
    if QUALITY.exists():
        print(table())


if __name__ == "__main__":
    main()

"""Puts a trained model into the package.

    python -m training.export --model OUT --evaluation OUT/evaluation.json

Copies the fp16 weights and configurations into ``src/lsync_compile/assets/mini/``, checks that
the pipeline's own loaders accept them and that they stay below the size limit, and writes the
model card from the recorded runs and the evaluation: nothing in it is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from lsync_compile.models.checkpoint import (
    load_audio_encoder,
    load_unet,
    load_vae,
    resolve_checkpoint,
)

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 24_000_000  # bytes, all files together
FILES = (
    "unet.json",
    "unet.safetensors",
    "audio.json",
    "audio.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", type=Path, required=True, help="folder of the trained weights")
    p.add_argument("--evaluation", type=Path, help="evaluation.json (default: in --model)")
    p.add_argument("--device-name", default="one NVIDIA H100", help="for the model card")
    p.add_argument("--to", type=Path, default=ROOT / "src/lsync_compile/assets/mini")
    p.add_argument("--docs", type=Path, default=ROOT / "docs/mini", help="curves and sheets")
    args = p.parse_args(arguments)
    runs = {
        stage: read(file)
        for stage in ("vae", "ears", "unet")
        if (file := args.model / f"train_{stage}.json").exists() or stage != "ears"
    }
    evaluation = read(args.evaluation or args.model / "evaluation.json")

    copy(args.model, args.to)
    size = json.loads((args.to / "unet.json").read_text())["sample_size"] * 8
    (args.to / "mini.json").write_text(
        json.dumps({"version": 1, "resolution": size, "mask": None}, indent=2) + "\n"
    )
    check(args.to)
    args.docs.mkdir(parents=True, exist_ok=True)
    curves(args.docs, runs)
    for sheet in args.model.glob("*.png"):
        small = Image.open(sheet)
        small.thumbnail((1400, 2000))
        small.convert("RGB").save(args.docs / f"{sheet.stem}.jpg", quality=85)
    (args.docs / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n")
    (args.to / "README.md").write_text(card(runs, evaluation, args.device_name))
    print(f"{args.to}: {folder_size(args.to) / 1e6:.2f} MB of {LIMIT / 1e6:.0f} MB")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def copy(source: Path, target: Path) -> None:
    """Copy the model's files; refuses before writing if they are too large together."""
    total = sum((source / name).stat().st_size for name in FILES)
    if total > LIMIT:
        raise SystemExit(f"{source}: {total / 1e6:.2f} MB of weights; at most {LIMIT / 1e6:.0f} MB")
    for name in FILES:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def folder_size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


@torch.no_grad()
def check(folder: Path) -> None:
    """Load everything as the pipeline does and run it once; raises if a value is not finite."""
    found = resolve_checkpoint(folder)
    vae, audio = load_vae(found), load_audio_encoder(found)
    unet = load_unet(found.unet_file, found.unet_config)
    side = found.resolution // 8
    pixels = torch.rand(1, 3, found.resolution, found.resolution) * 2 - 1
    features = audio.encode(torch.randn(3200) * 0.1)
    tokens = features.flatten(0, 1)[None].repeat(2, 1, 1)
    results = {
        "the VAE": vae.decode(vae.encode(pixels).latent_dist.mode()).sample,
        "the audio encoder": features,
        "the UNet": unet(torch.randn(1, 13, 2, side, side), torch.tensor(500), tokens).sample,
    }
    for name, value in results.items():
        if not torch.isfinite(value).all():
            raise SystemExit(f"{folder}: {name} gives values that are not finite")


def curves(folder: Path, runs: dict[str, dict[str, Any]]) -> None:
    """``curves.json`` with every recorded point, and a picture of the losses."""
    (folder / "curves.json").write_text(
        json.dumps({stage: whole_curve(run) for stage, run in runs.items()}) + "\n"
    )
    joined = {"curve": whole_curve(runs["unet"])}
    lines = {
        "VAE: loss": series(runs["vae"], "loss"),
        "UNet: squared error of the noise": series(joined, "mse"),
        "UNet, held out: right sound": series(joined, "val_right"),
        "UNet, held out: wrong sound": series(joined, "val_wrong"),
    }
    plot(folder / "curves.png", lines)


def whole_curve(run: dict[str, Any]) -> list[dict[str, float]]:
    """The points of a run, after those of the run it began from."""
    earlier = run.get("earlier")
    if earlier is None:
        return list(run["curve"])
    before = whole_curve(earlier)
    seconds, steps = earlier["seconds"], earlier["steps"]
    return before + [
        p | {"seconds": p["seconds"] + seconds, "step": p["step"] + steps} for p in run["curve"]
    ]


def ears_row(runs: dict[str, dict[str, Any]]) -> str:
    """The card's row for the sound encoder taught alone, if it was."""
    ears = runs.get("ears")
    if ears is None:
        return ""
    minutes = f"{ears['seconds'] / 60:.1f}" if "seconds" in ears else "n/a"
    return (
        f"| sound encoder alone | {ears['steps']} | {ears['batch']} pieces of 3.2 s "
        f"| {minutes} | {ears['seed']} |\n"
    )


def stage_rows(run: dict[str, Any]) -> str:
    """Rows of the card's table for a run and for those it began from."""
    row = (
        f"| UNet and sound encoder | {run['steps']} | {run['batch']} chunks of {run['frames']} "
        f"frames | {run['seconds'] / 60:.1f} | {run['seed']} |"
    )
    return f"{stage_rows(run['earlier'])}\n{row}" if "earlier" in run else row


def averaged(run: dict[str, Any]) -> str:
    """The card's sentence on the mean of two runs' weights, if that is what the weights are."""
    if "averaged" not in run:
        return ""
    return (
        f"\nThe weights are the mean of the last run's ({run['averaged']:.0%}) and of those "
        "it began from (`training/average.py`).\n"
    )


def series(run: dict[str, Any], key: str) -> list[tuple[float, float]]:
    return [(p["seconds"] / 60, p[key]) for p in run["curve"] if key in p]


def plot(path: Path, lines: dict[str, list[tuple[float, float]]]) -> None:
    """Small panels over minutes, logarithmic upwards; the two held-out lines share one."""
    panels: list[tuple[str, list[Sequence[tuple[float, float]]]]] = []
    for name, points in lines.items():
        if name.endswith("wrong sound") and panels:
            panels[-1] = (f"{panels[-1][0]} (blue), wrong (red)", [*panels[-1][1], points])
        else:
            panels.append((name, [points]))
    width, height, margin = 380, 220, 34
    image = Image.new("RGB", (width * len(panels), height), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    for index, (name, sets) in enumerate(panels):
        points = [p for s in sets for p in s]
        if len(points) < 2:
            continue
        left = index * width + margin
        right, top, bottom = (index + 1) * width - 12, 26, height - 22
        times = [t for t, _ in points]
        logs = [math.log10(max(v, 1e-9)) for _, v in points]
        low, high = min(logs), max(max(logs), min(logs) + 1e-6)
        span = max(max(times) - min(times), 1e-6)
        draw.text((left, 6), name, fill=(0, 0, 0))
        draw.rectangle((left, top, right, bottom), outline=(200, 200, 200))
        for value, row in ((high, top), (low, bottom - 10)):
            draw.text((index * width + 2, row), f"{10**value:.2g}", fill=(90, 90, 90))
        draw.text((right - 60, bottom + 4), f"{max(times):.1f} min", fill=(90, 90, 90))
        for line, ink in zip(sets, ((40, 80, 170), (200, 60, 50)), strict=False):
            path_points = [
                (
                    left + (t - min(times)) / span * (right - left),
                    bottom - (math.log10(max(v, 1e-9)) - low) / (high - low) * (bottom - top),
                )
                for t, v in line
            ]
            draw.line(path_points, fill=ink, width=2)
    image.save(path)


def card(runs: dict[str, dict[str, Any]], evaluation: dict[str, Any], device: str) -> str:
    """The model card."""
    vae, unet = runs["vae"], runs["unet"]
    data = unet["data"]
    real = [r for r in data["recordings"] if r["kind"] == "real"]
    portrait = [r for r in data["recordings"] if r["kind"] == "portrait"]
    millions = {
        "UNet": unet["parameters"]["unet"],
        "sound encoder": unet["parameters"]["audio"],
        "VAE": vae["parameters"],
    }
    sizes = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in millions.items())
    rows = "\n".join(table_row(name, r) for name, r in evaluation["recordings"].items())
    people = ", ".join(f"{r['name']} ({r['trained on']} of {r['frames']} frames)" for r in real)
    return f"""# lsync-mini

LatentSync's architecture at small widths, for 256x256 faces: a model to try lsync-compile with,
to run its tests on trained weights, and to measure quality where there is no LatentSync
checkpoint. It is no replacement for LatentSync.

Parameters: {sizes}; fp16. Trained from scratch by the scripts in `training/` on {device}.

| stage | steps | batch | minutes | seed |
| --- | --- | --- | --- | --- |
| VAE | {vae["steps"]} | {vae["batch"]} faces | {vae["seconds"] / 60:.1f} | {vae["seed"]} |
{ears_row(runs)}{stage_rows(unet)}
{averaged(unet)}
## Data

- Real talking faces: {people}; the rest of each is held out. Two speakers in all.
- Takes of one animated portrait (public domain): {sum(r["frames"] for r in portrait)} frames.
- Drawn people, made while training ({unet["clips_made"]} clips of all kinds), moved by
  {data["speech for drawn people, seconds"]} s of synthesised and recorded speech.

## Held-out parts, synced to their own sound

{evaluation["steps"]} DDIM steps, guidance {evaluation["guidance"]}; the reference frames are from
another time. PSNR of the mouth region in dB, correlation of mouth opening and sound (best offset
in frames).

| recording | ours | reference's mouth | muted | VAE alone | correlation, ours | original |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

{outcome(evaluation["recordings"])}

The VAE's round trip on held-out faces: {vae["held_out_psnr"]} dB ({vae["held_out_psnr_mouth"]} dB
at the mouth), the upper bound of anything this model draws.

## What it can't do

- Other people: with two real speakers it draws mouths that resemble theirs; identity, teeth and
  beards suffer.
- Profile views, hands or objects before the mouth, faces much larger than 256 pixels.
- Sounds unlike speech; singing; several voices at once.
- Fine articulation: it was trained on {sum(r["trained on"] for r in real) / 25:.0f} seconds of
  real speech.

Losses: `docs/mini/curves.png`; all figures: `docs/mini/evaluation.json`; frames beside them.
"""


def outcome(recordings: dict[str, Any]) -> str:
    """In words, which tests every recording passes and which it does not."""
    tests = {
        "nearer than copy": "nearer to the original than the reference's mouth",
        "nearer than muted": "nearer to the original than the same model with the sound muted",
        "follows the sound": "opened in time with the sound",
        "follows new speech": "opened in time with another speech, the old mouth as reference",
    }
    lines = []
    for key, words in tests.items():
        passed = [name for name, report in recordings.items() if report["verdict"][key]]
        failed = [name for name in recordings if name not in passed]
        where = "on all" if not failed else "**not** on " + ", ".join(failed)
        lines.append(f"- {words}: {where}")
    return "The mouth is\n\n" + "\n".join(lines)


def table_row(name: str, report: dict[str, Any]) -> str:
    mouth, sync = report["mouth"], report["sync"]

    def follows(which: str) -> str:
        found = sync[which]
        if "correlation" not in found:
            return "n/a"
        return f"{found['correlation']:.2f} ({found['best']:.2f} at {found['offset']})"

    values = " | ".join(f"{mouth[k]['psnr']:.2f}" for k in ("ours", "copy", "muted", "vae"))
    return f"| {name} | {values} | {follows('ours')} | {follows('original')} |"


if __name__ == "__main__":
    main()

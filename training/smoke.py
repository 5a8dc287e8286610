"""Runs the whole training path at a tiny size: data, VAE, UNet, evaluation, export.

    python -m training.smoke --out /tmp/smoke

A few minutes on two CPU cores. The result is no model, but every file is made and every loader
has accepted it; run it before renting a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import fields
from pathlib import Path

import cv2
import torch
from torch import Tensor

from training import evaluate, export, train_ears, train_unet, train_vae
from training.data import MANIFEST, VERSION, write_pictures, write_sound
from training.features import Motion
from training.speech import mouth_tracks, normalise
from training.synthetic import FaceSampler

SIZE = 64
FRAMES, TRAIN = 72, 52


def babble(seconds: float, seed: int) -> Tensor:
    """A buzz with syllables and changing vowels: ``(seconds * 16000,)`` fp32."""
    generator = torch.Generator().manual_seed(seed)
    count = int(16000 * seconds)
    time_axis = torch.arange(count) / 16000

    def wander(per_second: float) -> Tensor:
        knots = torch.rand(1, 1, int(seconds * per_second) + 2, generator=generator)
        return torch.nn.functional.interpolate(knots, count, mode="linear")[0, 0]

    phase = 2 * math.pi * torch.cumsum(110 + 30 * torch.sin(2.5 * time_axis + seed), 0) / 16000
    loud, vowel = (wander(7.4) - 0.35).clamp(min=0), wander(3)
    harmonics = [
        torch.sin(k * phase) / k * (1 if k < 4 else vowel if k < 12 else 1 - vowel)
        for k in range(1, 25)
    ]
    return normalise((torch.stack(harmonics).sum(0) * loud)[None])[0]


def make_data(folder: Path, *, people: int = 2) -> None:
    """A prepared folder (as of `training.prepare`) with drawn people in place of real ones."""
    folder.mkdir(parents=True, exist_ok=True)
    sampler = FaceSampler(seed=5)
    clips, speech = [], []
    for person in range(people):
        sound = babble(FRAMES / 25, 10 + person)
        identity = sampler.identity(1)
        motion = sampler.motion(*mouth_tracks(sound[None], FRAMES))
        pictures = []
        for start in range(0, FRAMES, 12):
            part = Motion(*(getattr(motion, f.name)[:, start : start + 12] for f in fields(Motion)))
            for picture in sampler.render(identity, part)[0].permute(0, 2, 3, 1).numpy():
                pictures.append(cv2.imencode(".jpg", picture[..., ::-1])[1].tobytes())
        name = f"drawn{person}"
        write_pictures(folder / f"{name}.frames.npz", pictures)
        write_sound(folder / f"{name}.sound.npz", sound)
        clips.append(
            {
                "name": name,
                "kind": "real",
                "frames": f"{name}.frames.npz",
                "sound": f"{name}.sound.npz",
                "train": [0, TRAIN],
                "heldout": [TRAIN, FRAMES],
            }
        )
        write_sound(folder / f"speech{person}.npz", babble(8, 20 + person))
        speech.append({"name": f"speech{person}", "sound": f"speech{person}.npz"})
    manifest = {"version": VERSION, "clips": clips, "speech": speech}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def small_configs(folder: Path) -> list[str]:
    """Narrow configurations of both networks; the arguments that select them."""
    unet = json.loads(train_unet.UNET_CONFIG.read_text())
    unet |= {
        "sample_size": SIZE // 8,
        "block_out_channels": [16, 16, 32, 32],
        "attention_head_dim": [1, 1, 1, 1],
        "norm_num_groups": 4,
    }
    audio = json.loads(train_unet.AUDIO_CONFIG.read_text()) | {"width": 32}
    folder.mkdir(parents=True, exist_ok=True)
    for name, config in (("unet", unet), ("audio", audio)):
        (folder / f"small_{name}.json").write_text(json.dumps(config))
    return [
        *("--unet-config", str(folder / "small_unet.json")),
        *("--audio-config", str(folder / "small_audio.json")),
    ]


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--vae-steps", type=int, default=12)
    p.add_argument("--unet-steps", type=int, default=12)
    p.add_argument("--device", default="cpu")
    args = p.parse_args(arguments)
    data, model, state = (args.out / part for part in ("data", "model", "state"))
    started = time.monotonic()

    def done(stage: str) -> None:
        print(f"smoke: {stage} after {time.monotonic() - started:.0f} s", flush=True)

    make_data(data)
    done("data made")
    common = ["--data", str(data), "--out", str(model), "--size", str(SIZE)]
    common += ["--device", args.device]
    stored = ["--state", str(state)]
    vae_half = max(1, args.vae_steps // 2)
    for steps in (vae_half, args.vae_steps):  # the second call resumes the first
        train_vae.main(
            [
                *common, *stored, "--steps", str(steps), "--batch", "6", "--pool", "8",
                "--widths", "8", "16", "16", "16", "--groups", "4", "--log-every", "4",
                "--check-every", "8", "--refresh-every", "1000",
            ]
        )  # fmt: skip
    done("VAE trained")
    configs = small_configs(args.out)
    ears = args.out / "ears"
    train_ears.main(
        [
            "--data", str(data), "--out", str(ears), "--steps", "4", "--batch", "2",
            *configs[2:], "--device", args.device,
        ]
    )  # fmt: skip
    done("sound encoder trained")
    unet = [
        *common, "--vae", str(model / "vae"), *configs, "--batch", "3", "--ears", str(ears),
        "--slots", "2", "0", "1", "--length", "32", "--log-every", "4", "--check-every", "8",
        "--refresh-every", "1000",
    ]  # fmt: skip
    train_unet.main([*unet, *stored, "--steps", str(max(1, args.unet_steps // 2))])
    # As after the loss of the machine: no state, only what came back.
    lost = ["--state", str(args.out / "lost"), "--init", str(model)]
    train_unet.main([*unet, *lost, "--steps", str(args.unet_steps)])
    done("UNet trained")
    evaluate.main([*common, "--model", str(model), "--steps", "4"])
    done("evaluated")
    export.main(
        ["--model", str(model), "--to", str(args.out / "mini"), "--docs", str(args.out / "docs")]
    )
    done("exported")


if __name__ == "__main__":
    main()

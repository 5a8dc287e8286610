"""Does the trained model lip-sync? Held-out parts of the recordings, synced to their own sound.

    python -m training.evaluate --data .train --model OUT --out OUT

For each recording the frames that training never saw are redrawn as the pipeline does it (20
DDIM steps, guidance 1.5, one noise frame), with the reference frames taken half of that part
away, so that the answer is not among the inputs. The mouth region is compared with the original
beside what a user would get without the model: the reference's mouth pasted in ("copy"), the
same model with the sound muted, and, as the upper bound, the VAE's round trip.

How far the mouth is open and how loud the sound is are measured as in `lsync_compile.quality`. A
last test gives the model the clip's own frames as reference and another clip's speech, which is
what users do: the mouth has to follow the new speech and not the old one.

Writes ``evaluation.json`` and one contact sheet for each recording.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from lsync_compile.models.audio import audio_windows
from lsync_compile.models.checkpoint import load_unet
from lsync_compile.models.mel_encoder import MelAudioEncoder
from lsync_compile.models.scheduler import default_scheduler
from lsync_compile.models.unet import UNet3DConditionModel
from lsync_compile.quality.sync import (
    Array,
    correlations,
    measure_sync,
    mouth_opening,
    sound_energy,
    speech_band,
)
from training.codec import decode, encode, load_vae
from training.denoise import sample
from training.footage import load_footage
from training.loop import write_json
from training.losses import mouth_box
from training.sheet import contact_sheet
from training.sources import SAMPLES, Recording

CHUNK = 16
FPS = 25.0
SAMPLE_RATE = 16000


@dataclass
class Model:
    unet: UNet3DConditionModel
    audio: MelAudioEncoder
    vae: AutoencoderKL
    dtype: torch.dtype

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> Model:
        """From the folder that the training scripts write (or `training.export`)."""
        config = json.loads((folder / "unet.json").read_text())
        unet = load_unet(folder / "unet.safetensors", config, dtype=dtype)
        audio = MelAudioEncoder.from_pretrained(folder)
        vae = load_vae(folder / "vae", device, dtype)
        return cls(unet.to(device).eval(), audio.to(device).eval(), vae, dtype)

    @torch.no_grad()
    def redraw(
        self,
        pixels: Tensor,
        reference: Tensor,
        sound: Tensor,
        mask: Tensor,
        *,
        steps: int = 20,
        guidance: float = 1.5,
        seed: int = 0,
    ) -> Tensor:
        """Faces ``(n, 3, S, S)`` in [-1, 1] with the mouths redrawn to ``sound (m,)``.

        What the mask keeps is taken from ``pixels``, as the pipeline does.
        """
        frames, side = len(pixels), pixels.shape[-1] // 8
        features = self.audio.encode(sound)
        windows = self.audio.mark(audio_windows(features, 0, frames))
        masked, taken = encode(self.vae, pixels * mask), encode(self.vae, reference)
        small = F.interpolate(mask[None], size=(side, side))[0]
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(1, 4, 1, side, side, generator=generator).to(pixels.device)
        drawn = []
        for start in range(0, frames, CHUNK):
            here = slice(start, start + CHUNK)
            latents = sample(
                self.unet,
                default_scheduler(),
                masked[here].transpose(0, 1)[None].float(),
                taken[here].transpose(0, 1)[None].float(),
                windows[here][None],
                small,
                noise,
                steps=steps,
                guidance=guidance,
                dtype=self.dtype,
            )
            drawn.append(decode(self.vae, latents[0].transpose(0, 1)))
        return torch.cat(drawn) * (1 - mask) + pixels * mask


def opening_of(pixels: Tensor) -> Array:
    return mouth_opening((pixels + 1) / 2)


def sync_report(opening: Array, energy: Array, original: Array) -> dict[str, Any]:
    """How an opening follows the sound, and the original's opening."""
    report: dict[str, Any] = {
        name: round(value, 3) if isinstance(value, float) else value
        for name, value in measure_sync(opening, energy).to_dict().items()
        if value not in ("", None)
    }
    alike = correlations(speech_band(opening, FPS), speech_band(original, FPS), 0)
    report["with the original"] = round(float(alike[0]), 3)
    report["movement of the original's"] = round(float(opening.std() / original.std()), 3)
    return report


def region_error(drawn: Tensor, original: Tensor) -> dict[str, float]:
    """PSNR (dB, pixels in [0, 1]) and mean absolute error (of 255) of the mouth region."""
    rows, columns = mouth_box(original.shape[-1])
    difference = (drawn - original)[..., rows, columns].float() / 2
    return {
        "psnr": round(float(-10 * torch.log10(difference.square().mean())), 3),
        "l1": round(float(difference.abs().mean()) * 255, 3),
    }


def evaluate(
    model: Model,
    take: Recording,
    other_sound: Tensor,
    mask: Tensor,
    out: Path,
    *,
    steps: int,
    guidance: float,
) -> dict[str, Any]:
    """All measures for one recording, and its contact sheet."""
    pixels = take.frames[take.train :].float() / 127.5 - 1
    frames = len(pixels)
    sound = take.sound[take.train * SAMPLES :][: frames * SAMPLES]
    reference = pixels.roll(frames // 2, 0)
    other = other_sound[: frames * SAMPLES]
    redraw = partial(model.redraw, mask=mask, steps=steps, guidance=guidance)
    results = {
        "ours": redraw(pixels, reference, sound),
        "muted": redraw(pixels, reference, torch.zeros_like(sound)),
        "no guidance": redraw(pixels, reference, sound, guidance=1.0),
        "copy": reference * (1 - mask) + pixels * mask,
        "vae": decode(model.vae, encode(model.vae, pixels)) * (1 - mask) + pixels * mask,
        "own reference": redraw(pixels, pixels, sound),
    }
    swapped = redraw(pixels, pixels, other)

    original = opening_of(pixels)
    heard, new = (
        sound_energy(part.cpu(), frames, sample_rate=SAMPLE_RATE, fps=FPS)
        for part in (sound, other)
    )
    report: dict[str, Any] = {"frames": frames, "mouth": {}, "sync": {}}
    for name, drawn in results.items():
        report["mouth"][name] = region_error(drawn, pixels)
    for name, drawn in {"original": pixels, **results}.items():
        report["sync"][name] = sync_report(opening_of(drawn), heard, original)
    report["other speech"] = sync_report(opening_of(swapped), new, original)
    report["other speech, old mouth"] = sync_report(original, new, original)

    chosen = torch.linspace(0, frames - 1, min(12, frames), device=pixels.device).long()
    shown = {"original": pixels, "reference": reference, **results, "other speech": swapped}
    shown.pop("no guidance")
    bars = {
        "sound": heard,
        "opening, original": original,
        "opening, ours": opening_of(results["ours"]),
        "new sound": new,
        "opening, new sound": opening_of(swapped),
    }
    contact_sheet(
        out / f"{take.name.replace('/', '_')}.png",
        {name: faces[chosen] for name, faces in shown.items()},
        bars={name: scaled(values)[chosen.cpu()] for name, values in bars.items()},
    )
    return report


def scaled(values: Array) -> Tensor:
    tensor = torch.from_numpy(values)
    return (tensor - tensor.min()) / (tensor.max() - tensor.min()).clamp(min=1e-6)


def verdict(report: dict[str, Any]) -> dict[str, bool]:
    """What the model must show, for one recording."""
    mouth, sync = report["mouth"], report["sync"]
    new = report["other speech"]
    return {
        "nearer than copy": mouth["ours"]["psnr"] > mouth["copy"]["psnr"],
        "nearer than muted": mouth["ours"]["psnr"] > mouth["muted"]["psnr"],
        "follows the sound": sync["ours"].get("correlation", 0) > sync["ours"].get("chance", 0.3),
        "follows new speech": new.get("correlation", 0) > new.get("chance", 0.3)
        and new.get("correlation", 0) > new["with the original"],
    }


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="folder made by training.prepare")
    p.add_argument("--model", type=Path, required=True, help="folder of the trained weights")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--guidance", type=float, default=1.5)
    p.add_argument("--size", type=int, default=256)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args(arguments)
    device = torch.device(args.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    footage = load_footage(args.data, device, size=args.size)
    model = Model.load(args.model, device, dtype)
    takes = [r for r in footage.of("real") if r.train and len(r.frames) - r.train >= CHUNK]
    result: dict[str, Any] = {"steps": args.steps, "guidance": args.guidance, "recordings": {}}
    for index, take in enumerate(takes):
        other = takes[(index + 1) % len(takes)]
        report = evaluate(
            model,
            take,
            other.sound[other.train * SAMPLES :].repeat(8),
            footage.mask,
            args.out,
            steps=args.steps,
            guidance=args.guidance,
        )
        report["verdict"] = verdict(report)
        result["recordings"][take.name] = report
        print(take.name, json.dumps(report, indent=1), flush=True)
    write_json(args.out / "evaluation.json", result)


if __name__ == "__main__":
    main()

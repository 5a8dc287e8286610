"""Teach the sound encoder how far and how wide a mouth opens, before it meets a face.

    python -m training.train_ears --data .train --out ears

Seconds on a GPU, minutes on a CPU. The targets are computed from the sound itself
(`training.speech.mouth_tracks`), so all speech at hand can be used. With the noise objective alone,
the encoder would have to find the loudness of speech through the whole UNet, which takes most of a
short run.

Writes ``audio.safetensors``, ``audio.json`` and ``train_ears.json``: correlation of what a linear
map reads from the features of the held-out ends of the real recordings with the targets.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from lsync_compile.models.mel_encoder import MelAudioEncoder
from training.augment import colour_mel, jitter_mel, jitter_sound
from training.denoise import FEATURES_PER_FRAME
from training.footage import load_footage
from training.loop import learning_rate, write_json
from training.sources import SAMPLES, Footage
from training.speech import SpeechSampler, mouth_tracks
from training.train_unet import AUDIO_CONFIG

FRAMES = 80


class Reader(nn.Module):
    """A sound encoder, and a linear map from each of its states to opening and width."""

    def __init__(self, audio: MelAudioEncoder) -> None:
        super().__init__()
        self.audio = audio
        self.read = nn.ModuleList(nn.Linear(audio.feature_dim, 2) for _ in range(audio.states))

    def forward(self, mel: Tensor) -> Tensor:
        """``(B, bands, 4 F)`` -> ``(states, B, F, 2)``: read from the two steps of each frame."""
        features = self.audio(mel).unflatten(1, (-1, FEATURES_PER_FRAME)).mean(2)
        return torch.stack([read(features[:, :, i]) for i, read in enumerate(self.read)])


def targets(sound: Tensor, frames: int) -> Tensor:
    """Opening and width, each from about -1 to 1: ``(B, F, 2)``."""
    opening, width = mouth_tracks(sound, frames)
    return torch.stack([2 * opening - 1, width], dim=-1)


@torch.no_grad()
def held_out(reader: Reader, footage: Footage) -> dict[str, dict[str, float]]:
    """Correlations with the targets, of the last state."""
    result = {}
    for take in footage.of("real"):
        sound = take.sound[take.train * SAMPLES :][None]
        frames = sound.shape[1] // SAMPLES
        if not frames:
            continue
        sound = sound[:, : frames * SAMPLES]
        read = reader(reader.audio.mel(sound))[-1, 0]
        pairs = zip(read.T, targets(sound, frames)[0].T, ("opening", "width"), strict=True)
        result[take.name] = {
            name: round(float(torch.corrcoef(torch.stack([seen, wanted]))[0, 1]), 3)
            for seen, wanted, name in pairs
        }
    return result


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    started = time.monotonic()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    footage = load_footage(args.data, device, size=args.size)
    audio = MelAudioEncoder(**json.loads(args.audio_config.read_text()))
    reader = Reader(audio).to(device)
    real = [take.sound[: take.train * SAMPLES].cpu() for take in footage.of("real")]
    speech = SpeechSampler([*footage.speech, *real], seed=args.seed, device=device)
    # The marks of a window's steps are no part of this.
    weights = [p for name, p in reader.named_parameters() if name != "audio.marks"]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.02)
    curve = []
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, step / args.steps)
        said = speech.batch(args.batch, FRAMES)
        wanted = torch.stack([2 * said.opening - 1, said.width], dim=-1)
        read = reader(colour_mel(jitter_mel(audio.mel(jitter_sound(said.sound)))))
        loss = (read - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == args.steps - 1:
            curve.append({"step": step, "loss": round(float(loss), 4)})
            print(
                f"ears: {step:5d} | loss {float(loss):.4f} | {held_out(reader, footage)}",
                flush=True,
            )
    audio.save_pretrained(args.out)
    result = {
        "steps": args.steps,
        "seconds": round(time.monotonic() - started, 1),
        "batch": args.batch,
        "seed": args.seed,
        "correlation on held-out speech": held_out(reader, footage),
        "curve": curve,
    }
    write_json(args.out / "train_ears.json", result)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="folder made by training.prepare")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--audio-config", type=Path, default=AUDIO_CONFIG)
    p.add_argument("--steps", type=int, default=600)
    p.add_argument("--batch", type=int, default=24, help="pieces of 3.2 seconds a step")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--size", type=int, default=64, help="of the faces, which are not looked at")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--seed", type=int, default=1)
    return p.parse_args(arguments)


if __name__ == "__main__":
    main()
